"""Real backbones and judges under the miniature's own training code: the same update, other modules behind it.

* `backbones`: diffusers transformers behind one `velocity(x, t, text, reference)`, in the conventions of flow.py
* `roles`: student, fake score and teacher as three modules, or as one base with LoRA adapters
* `judges`: transformers vision-language models behind one `logit_margin(images, question)`
* `requests`: prompts, the questions of the released code, and batches of them
* `budget`: parameters, bytes and FLOPs of an update, counted on the meta device
* `tiny`: the same classes with a few thousand random weights, written to disk, for tests and notebooks
"""
