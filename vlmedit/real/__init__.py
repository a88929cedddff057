"""Real backbones and judges under the miniature's own training code: the same update, other modules behind it.

* `backbones`: diffusers transformers behind one `velocity(x, t, text, reference)`, in the conventions of flow.py
* `roles`: student, fake score and teacher as three modules, or as one base with LoRA adapters
* `judges`: transformers vision-language models behind one `logit_margin(images, question)`
* `requests`: prompts, the questions of the released code, and batches of them
* `datasets`: manifests, shards, and data sets of others read without their targets; `prepare`: a folder of pictures becomes a manifest
* `benchmarks`: GEdit-Bench, ImgEdit-Bench and DreamBooth by VIEScore, CLIP and DINO
* `budget`: parameters, bytes and FLOPs of an update, counted on the meta device
* `settings`, `feed`, `cache`, `loading`, `train`, `sharding`: a run, from a YAML file to a trained student, on one GPU or many
* `plan`: what a run would hold and compute, before anything is loaded
* `export`: the student as a diffusers pipeline that needs nothing of this package; `editor`: what `vlmedit edit` makes of it
* `rehearsal`, `tiny`: the same classes with a few thousand random weights, written to disk, for tests and notebooks
"""
