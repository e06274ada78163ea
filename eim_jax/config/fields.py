"""Every field of a run, with its default and what it means: frozen dataclasses."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Towers:
    """The pretrained towers: directories in Hugging Face's layout, hub ids, or the shipped "miniature/..."."""

    # The vision tower with its text tower: a CLIP or SigLIP; or a DINOv2, which has none.
    clip: str = "openai/clip-vit-base-patch32"
    text: str = ""  # the text tower that makes K_t, a CLIP or SigLIP, for a vision tower that has none
    image_size: int = 0  # side of the pictures that the vision tower sees (positions interpolated); 0: its own
    lm: str = "gpt2"  # a GPT-2 or a LLaMA, by its config.json
    dropout: float = 0.1  # of GPT-2, in training (LLaMA has none; its adapters': arm.*.adapter_dropout)
    quant: str = "none"  # the LLaMA's frozen linear layers: none | nf4 (4 bits, LaVIN "lite")
    image_stats: str = "clip"  # by which images are normalised: clip (its own) | imagenet (LaVIN's)
    scan: bool = False  # layers as one scanned stack: compiles faster when there are many; unrolled runs faster on CPU
    remat: str = "none"  # what the backward pass recomputes: none | dots | full
    # softmax (ours, its weights in float32) | xla | cudnn (flash attention; NVIDIA GPUs, bfloat16) | auto (cudnn there
    # from 128 tokens on, else softmax)
    attention: str = "auto"
    dtype: str = "auto"  # of computation: float32 | bfloat16 | auto (float32 on CPU, bfloat16 elsewhere)


@dataclass(frozen=True, init=False)
class Data:
    """The data set, how its text is cut, and what happens to bad items.

    The fields below are every kind's. What one kind alone needs (the annotations of coco, the folder of scienceqa) are
    fields of its own: they are given beside these, `Data(kind="coco", annotations="captions.json")`, are kept in `own`,
    and stand beside these in a ConfigDict, on the command line and in run.json. Which they are says the data set
    (eim_jax/data/datasets), which also reads and checks them.
    """

    # coco (COCO's own or Karpathy's JSON, your own photos in either form) | scienceqa (the official folder) | instruct
    # (Alpaca's and LLaVA's forms, yours in either) | miniature, miniature_qa, miniature_chat (drawn by the package)
    kind: str = "coco"
    prepared: str = ""  # read this folder, written by --mode=prepare, in place of the data set's files
    fit: str = "crop"  # how an image becomes square: crop (CLIP) | stretch (LaVIN)
    on_bad: str = "error"  # a bad item stops the run (error) or leaves data and queues, counted in the log (drop)
    max_tokens: int = 40  # instruction + response + EOS, what precedes them not counted; ClipCap's length on COCO
    max_tokens_text_only: int = 0  # of a row without a picture, if that may be longer; 0: max_tokens
    # How prompt and answer become one row (data/rows.py): one_string (LaVIN, LLaMA-Adapter) | spaced (a space between)
    # | apart (earlier versions) | tokenizer (set by data.template=tokenizer) | auto (by the LM's tokenizer, kept in
    # run.json).
    seam: str = "auto"
    # What too long a row loses: balanced (the answer's end, EOS stays, then the prompt's beginning) | end (LaVIN,
    # LLaMA-Adapter: what lies beyond, the whole answer perhaps).
    cut: str = "balanced"
    # Texts of a batch are cut to the smallest of so many lengths that holds them; the step is compiled once for each.
    buckets: int = 4  # 1: every batch is as long as the longest text
    length_window: int = 1  # batches whose samples are put together by length (then take 8 buckets); 1: none
    # Samples of a batch share rows of slots, each seeing itself alone: off | on | auto (where it pays: see the log).
    # The same losses and gradients up to rounding (with dropout, other draws): see docs/guides/padding.md.
    pack: str = "off"
    ignore_token: int = -1  # loss_base does not score tokens of this id (ClipCap: 0, GPT-2's "!"); -1: scores all
    eos: bool = True  # supervise an end-of-text token (ClipCap itself does not: it needs decode.stop_at_period)
    cache_features: bool = True  # keep a frozen CLIP's features on disk instead of recomputing them every epoch
    cache: str = ""  # folder for features, tokens, validation verdicts, compiled programs; "" = <workdir>/cache
    threads: int = 4  # that decode images
    scored: str = "test"  # the split that is scored: test | val (to choose settings on) | train (what it remembers)
    eval_limit: int = 0  # score at most so many test images; 0 = all
    own: dict[str, Any] = field(default_factory=dict)  # the fields that kinds of data set have for themselves

    def __init__(self, own: Mapping[str, Any] | None = None, **fields: Any):
        for shared in dataclasses.fields(self):
            if shared.name != "own":
                object.__setattr__(self, shared.name, fields.pop(shared.name, shared.default))
        object.__setattr__(self, "own", {**(own or {}), **fields})


@dataclass(frozen=True)
class Losses:
    """Settings of the queue losses (EIM sections 1 and 6; each default is argued in docs/choices.md)."""

    tau: float = 0.07
    similarity: str = "cosine"  # cosine | dot
    # Which keys are a query's own: self (the paper) | group (all captions of the image) | mask (siblings not in the
    # denominator) | others (the image's other captions, the own key in neither sum); by loss: "self, lm:others".
    positives: str = "self"
    # What a query is contrasted with besides its own key: queue (all others, the paper) | batch (the update's other
    # samples) | 10% (a fixed part of the queue) | recent-8 (the keys of so many batches before); by loss: "queue,
    # ie:batch". See docs/concepts/queues.md.
    negatives: str = "queue"
    # What is taken from a queue's keys and queries before they are normalised: none (the paper) | mean (of the queue's
    # keys, for features that nearly all point one way; see docs/concepts/cone.md); by loss: "lm:mean, st:mean".
    center: str = "none"
    lm_distil: bool = False  # loss_LM draws to the own key alone, (1 - cosine) / tau, instead of against all keys
    lm_with_image: bool = False  # loss_LM's query after the visual tokens, instead of text alone
    chunk: int = 0  # keys an online-softmax step reads; 0: 1024 on CPUs, 32768 on TPUs, more on GPUs
    queue_dtype: str = "auto"  # float32 | bfloat16 | int8 (a scale a row) | auto (float32 on CPU, bfloat16 elsewhere)

    def of(self, field: str, loss: str) -> str:
        """What `positives`, `negatives` or `center` is for one loss.

        Args:
          field: its name.
          loss: the loss's, as in LOSSES.

        Example:
          >>> settings = Losses(center="lm:mean")
          >>> settings.of("center", "lm"), settings.of("center", "st")
          ('mean', 'none')
        """
        for_all, named = by_loss(getattr(self, field))
        return named.get(loss, for_all or getattr(Losses, field))


def by_loss(value: str) -> tuple[str, dict[str, str]]:
    """Splits a setting that may differ from loss to loss into what it is for all ("" if unsaid), and by loss.

    >>> by_loss("self, lm:others")
    ('self', {'lm': 'others'})
    """
    parts = [part.strip() for part in value.split(",")]
    for_all = ",".join(part for part in parts if ":" not in part)  # several are none of the choices
    return for_all, {name.strip(): word.strip() for name, _, word in (p.partition(":") for p in parts if ":" in p)}


def _given(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}


class LossWeights(dict):
    """The weight of each loss in a stage by its name in eim_jax.losses.table; one that is 0 or absent is not computed.

    Example:
      >>> LossWeights(base=1, ie=0.5)
      {'base': 1.0, 'ie': 0.5}
      >>> LossWeights(base=1, ie=0) == LossWeights(base=1)
      True
    """

    def __init__(self, weights: Mapping[str, int | float] | Iterable = (), /, **named: int | float):
        super().__init__({name: float(weight) for name, weight in dict(weights, **named).items()})

    def __eq__(self, other: object) -> bool:
        """Whether the same losses have weights: where a config file adds one, each stage has it with weight 0."""
        return isinstance(other, dict) and _given(self) == _given(other)

    def __ne__(self, other: object) -> bool:
        """A dict's own would compare the zeros too."""
        return not self == other

    __hash__ = None


@dataclass(frozen=True)
class Stage:
    """One stage: which parameters train, on which losses, how long and how fast."""

    # Regular expressions over parameter paths (full match); an entry (pattern, factor) scales the group's rate.
    train: tuple = ()
    losses: LossWeights = field(default_factory=LossWeights)
    epochs: int = 10
    steps: int = 0  # overrides epochs when > 0
    batch: int = 40  # global: over all devices and micro-batches
    accumulate: int = 1  # micro-batches an update; the big batch's gradient, unless loss_mean is "microbatch"
    lr: float = 2e-5
    schedule: str = "linear"  # after the warm-up: linear (to 0) | cosine (to 0) | constant
    warmup_steps: int = 5000
    warmup_epochs: float = 0.0  # overrides warmup_steps when > 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    # Where eps joins the root of the second moment: after its bias correction (Adam's paper, PyTorch) | before it
    # (the AdamW of transformers 4, by which ClipCap was trained).
    eps_added: str = "after"
    # What loss_base is the mean of: tokens (all scored ones of the batch) | rows (of each row's mean) | microbatch (of
    # each of the `accumulate` micro-batches' mean, for every loss: LaVIN's and LLaMA-Adapter's scripts).
    loss_mean: str = "tokens"
    weight_decay: float = 0.0  # on tensors of two and more dimensions
    # A pattern of further leaves that it takes (full match): "lm/adapter/gate", which LLaMA-Adapter's script decays.
    decay_also: str = ""
    clip_norm: float = 0.0  # of the trained gradients together; 0 = no clipping


@dataclass(frozen=True)
class Arm:
    """One model variant and the sequence of stages that trains it; arms of a run are compared in its report."""

    description: str = ""
    # What the ST receives: full ([CLS] and all patches) | cls | grid ([CLS] and a pooled 7 x 7 grid, EIM on LaVIN) |
    # first (the first 50 tokens) | blocks ([CLS] after every fourth block, stock LaVIN). Of SigLIP, which has no [CLS]:
    # full (all patches) | pooled (its attention-pooled vector) | grid (that vector and the grid).
    features: str = "full"
    output_layer: bool = False  # whether CLIP's output layer (ln_post and projection) stands before the ST
    # ffn (EIM) | mlp, transformer (ClipCap's mappers, on one token) | projector (LaVIN's) | queries (LLaMA-Adapter's)
    st: str = "ffn"
    st_tokens: int = 10  # of mlp, transformer and queries; ffn and projector keep their input's number
    st_clip_length: int = 10  # of transformer: tokens that it makes from the image feature (prefix_length_clip)
    st_hidden: int = 3072  # of ffn, projector and queries (its width); mlp: half its output width
    st_layers: int = 8  # of transformer and queries
    st_heads: int = 8  # of transformer and queries
    st_bias: str = "zeros"  # its linear layers' first biases: zeros | uniform (PyTorch's U(+-1/sqrt(fan_in)))
    normalize_prefix: bool = False  # every token that the ST reads is divided by its L2 norm (ClipCap)
    prompts: int = 0  # deep visual prompt tokens a CLIP block; 0 = none
    prompt_hidden: int = 1408  # width of the MLP that re-parametrises them; 0 = plain prompts
    # What adapts a LLaMA: none | lavin (router adapters; the image enters as tokens) | prompts (LLaMA-Adapter's gated
    # attention; the image is added to the prompts).
    adapter: str = "none"
    adapter_rank: int = 8  # of lavin
    adapter_temperature: float = 10.0  # of lavin's router
    adapter_dropout: float = 0.1  # of lavin
    adapter_layers: int = 30  # of prompts: so many topmost layers
    adapter_scale: float = 1.0  # of lavin: factor of what the adapters add
    visual_adapter: bool = False  # router adapters in CLIP.visual too (lavin)
    # What routes them: sample (each image's own [CLS]) | position (LaVIN's code: the token at a position by the one
    # there of the batch's first image, so that what an image gives depends on its batch).
    visual_routing: str = "sample"
    # Low-rank terms (LoRA) beside linear layers of LM and CLIP.visual: regular expressions over the layers' paths (full
    # match), ("lm/blocks.*/attn/(q|v)",); a stage trains them by "lm/.*/lora/.*". () = none.
    lora: tuple = ()
    lora_rank: int = 8
    lora_alpha: float = 16.0  # their factor is alpha / rank
    lora_dropout: float = 0.0  # on their input, in training
    lora_rs: bool = False  # rsLoRA: the factor is alpha / sqrt(rank)
    sequence: tuple = ()  # names of stages, in order


@dataclass(frozen=True)
class Decode:
    """How text is generated; every method in `methods` is scored, the first one is the arm's answer."""

    methods: tuple = ("beam", "greedy")  # of greedy | beam | nucleus
    beams: int = 5
    max_tokens: int = 67
    stop_at_period: bool = False  # ClipCap's stop rule, for models trained with eos=False
    top_p: float = 0.8
    temperature: float = 1.0
    batch: int = 40
    raw_gates: bool = False  # LLaMA-Adapter's gates without tanh while text is generated (its v1 inference)
    # Positions of generated tokens: training (those of the training forward) | lavin (its generator's, one too low).
    rope: str = "training"
    answers: str = "generated"  # questions with options: read in the generated text | likelihood (each option's)
    unparsed: str = "wrong"  # an answer that cannot be read: wrong | random (an option drawn by the seed)
    java: bool = True  # METEOR and SPICE of captions by the reference's jars, where Java is installed


@dataclass(frozen=True)
class Checkpoint:
    """When the training state is saved; a finished stage always is. The newest one is kept."""

    every_steps: int = 1000
    every_minutes: float = 10.0  # and so long after the one before; 0: by steps alone, as several processes do anyway
    # What an arm's last stage leaves: last (its end) | best (the step that config.eval scored best, by `metric`).
    # Earlier stages always leave their end: what they train for is not what is scored.
    keep: str = "last"
    metric: str = "eval/nll"  # of `best`: a score as metrics.jsonl names it


@dataclass(frozen=True)
class Eval:
    """Scores while a stage trains, in metrics.jsonl as eval/NAME and train/NAME: no parameter depends on them.

    Both intervals 0: none. Otherwise each stage is scored so often, and at its end.
    """

    every_steps: int = 0
    every_epochs: float = 0.0  # may be a part of one
    split: str = "val"  # val | test
    limit: int = 200  # so many of its images or questions; 0 = all
    train: int = 0  # also so many of the training split's: what the model remembers; 0 = none
    method: str = "greedy"  # by which texts are generated for their scores; none: likelihoods alone


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    towers: Towers = field(default_factory=Towers)
    data: Data = field(default_factory=Data)
    losses: Losses = field(default_factory=Losses)
    # A checkpoint that every arm starts from, in place of drawn leaves and the towers' own: an export of ours,
    # ClipCap's .pt, LLaMA-Adapter's or LaVIN's .pth (known by its keys); "" = none.
    init: str = ""
    arms: tuple = ("eim",)  # which of `arm` run, in order
    arm: dict[str, Arm] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    decode: Decode = field(default_factory=Decode)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    mesh: tuple = (1, -1, 1)  # devices along data, fsdp, tensor; -1 = all that remain
    log_every: int = 50  # steps
    logging: tuple = ("tensorboard",)  # where its scalars go besides metrics.jsonl: tensorboard | wandb | trackio
    profile: str = ""  # "10:15": a trace of steps 10 to 14 of each stage, in <workdir>/<arm>/profile
