"""A fourth loss, in the config file that uses it: draws the ST's tokens to CLIP's own features of the same image.

python -m eim_jax.main --config=examples/own_loss.py --workdir=runs/own_loss
"""

import jax.numpy as jnp
import ml_collections

from eim_jax.configs import miniature
from eim_jax.losses.key_sources import IMAGES
from eim_jax.losses.kinds import ContrastiveLoss, QueueKind
from eim_jax.losses.table import LOSSES

FEATURES = QueueKind(
    name="features",
    symbol="K_v",
    source=IMAGES,
    encode=lambda vlm, params, images: vlm.encode_image(params, images).mean(axis=1),
    pooling="mean of CLIP.visual's tokens",
)

VISION = ContrastiveLoss(
    name="vision",
    title="loss_V",
    queue=FEATURES,
    query=lambda forward: forward.connected.astype(jnp.float32).mean(axis=1)[:, : forward.image_tokens.shape[2]],
    needs=frozenset({"image"}),
    needs_image=True,
)

LOSSES["vision"] = VISION


def get_config() -> ml_collections.ConfigDict:
    """The embedded default, whose stage of all losses has the new one too."""
    config = miniature.get_config()
    config.arm.eim.sequence = ("st", "lm", "joint")
    config.stages.joint.losses.vision = 0.5
    return config
