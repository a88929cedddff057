"""vlmedit: few-step image editors, learned without image pairs from a teacher and a VLM judge [arXiv:2510.14978].

Importing this costs nothing: everything heavy is imported when it is first named.
"""

from importlib import import_module

_HOMES = {
    "EditPipeline": "vlmedit.pipelines.shapes",
    "generate": "vlmedit.pipelines.text_to_image",
    "DiT": "vlmedit.networks.dit",
    "JudgeModel": "vlmedit.networks.judge",
}
__all__ = ["__version__", "load", *_HOMES]


def load(name_or_dir="shapes", role: str = "editor", device=None):
    """An `EditPipeline`: of a shipped family ("shapes"), of a folder that `save_pretrained` wrote, or of a run.

    `role` chooses the student of a family: editor, warm (before the no-pair training) or teacher (text to image alone).
    """
    from vlmedit.pipelines.shapes import load as load_pipeline

    return load_pipeline(name_or_dir, role, device)


def _version() -> str:
    """The installed distribution's; of a source folder that nobody installed, "unknown"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "unknown"


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
