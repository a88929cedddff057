"""`vlmedit doctor`: is this machine ready, and how long will training take on it?"""

from __future__ import annotations

from vlmedit.cli._shared import JsonFile, check_json, refuse

ORDER = 1


def doctor(*, quick: bool = False, json: JsonFile = None) -> int:
    """Check this installation and estimate how long training takes here.

    Args:
        quick: Do not time the training stages.
    """
    from vlmedit.doctor import examine, report
    from vlmedit.io import save_json

    refuse(check_json(json))
    checks = []
    for check in examine(timed=not quick):
        print(check.line(), flush=True)
        checks.append(check)
    if json:
        save_json(report(checks), json)
    return 0 if all(check.ok for check in checks) else 1
