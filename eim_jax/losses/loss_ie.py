"""loss_IE: the image's [CLS] against the captions' features, K_t (EIM, equation of loss_IE)."""

from eim_jax.losses.key_sources import CLIP_TEXTS
from eim_jax.losses.kinds import ContrastiveLoss, QueueKind

CAPTIONS = QueueKind(
    name="caption",
    symbol="K_t",
    source=CLIP_TEXTS,
    encode=lambda vlm, params, tokens: vlm.caption_feature(params, tokens),
    pooling="[EOS] of CLIP.text, projected",
)

IE = ContrastiveLoss(
    name="ie",
    title="loss_IE",
    queue=CAPTIONS,
    query=lambda forward: forward.vlm.pooled(forward.params, forward.image_tokens),
    needs=frozenset({"image"}),
    needs_image=True,  # ours: the paper only suspects that rows without an image do harm
)
