"""Your own photos and captions, in COCO's JSON form, through all three stages.

python -m eim_jax.main --config=configs/photos.py --workdir=runs/photos \
    --config.data.annotations=captions.json --config.data.images=photos/

Few photos are memorised rather than learned from: a check that everything works, image files to captions. Without
eval_annotations the scores are on the training photos themselves. Cost: N captions are N/40 steps an epoch.
"""

import ml_collections

from eim_jax.configs import clipcap_eim_coco


def get_config() -> ml_collections.ConfigDict:
    config = clipcap_eim_coco.get_config()
    for name, stage in config.stages.items():
        stage.warmup_steps = 20
        stage.epochs = 5 if name == "lm" else 60
        stage.lr = 1e-5 if name == "lm" else 5e-4
    config.stages.lm.warmup_epochs = 2.5  # a few hundred captions have too few steps in 5 epochs for 20 of them
    config.data.eval_annotations = ""
    config.data.strip = True
    config.log_every = 20
    config.checkpoint.every_steps = 200
    return config
