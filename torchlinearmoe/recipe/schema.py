"""The recipe as data: one frozen dataclass a section, every field documented under it.

Only declarations live here. `parse.py` reads TOML and `--section.key=value` into these classes by their annotations;
`validate.py` refuses combinations that cannot run. Fields that are `of_size` are brought by `model.family` and
`model.size`; whatever a file or the command line says beside them wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal


def of_size(plain: Any = None, **default: Any) -> Any:
    """A field whose value comes with the family and size.

    plain: the value of a size that does not name it; None where every size has to.
    """
    return field(metadata={"plain": plain}, **default)


def dimensions(section: type) -> dict[str, Any]:
    """The fields of a section that come with the family and size, and the plain value of each."""
    return {entry.name: entry.metadata["plain"] for entry in fields(section) if "plain" in entry.metadata}


@dataclass(frozen=True, kw_only=True)
class MoERecipe:
    """`[moe]`: the sparse feed-forward. Dimensions come with the family and size."""

    num_experts: int = of_size(0)
    """Experts a layer; 0 makes the feed-forward dense."""
    top_k: int = of_size(0)
    """Experts a token is sent to."""
    hidden_size: int = of_size(0)
    """Hidden width of one expert."""
    latent_size: int = of_size(0, default=0)
    """Channels that tokens are projected to before routed experts, and back after them; 0 for the model's width."""
    shared_hidden_size: int = of_size(0)
    """Hidden width of the shared expert every token passes; 0 for none."""
    shared_gate: bool = of_size(False)
    """Multiply the shared expert's output by a sigmoid gate of the token."""
    renormalize: bool = of_size(False)
    """Rescale the chosen experts' probabilities to sum to one."""
    routed_scaling: float = of_size(1.0, default=1.0)
    """What the chosen experts' weights are multiplied by."""
    score: Literal["softmax", "sigmoid"] = of_size("softmax", default="softmax")
    """What the router makes of its logits: probabilities over all experts, or a sigmoid of each by itself."""
    selection_bias: bool = of_size(False, default=False)
    """Give each expert a bias that is added to its score when experts are chosen, and only then. It stays as it was
    imported; `balance = "bias"` has one too, and moves it."""
    num_groups: int = of_size(0, default=0)
    """Groups of experts, of consecutive ones each; a token chooses groups first. 0 for none."""
    top_k_groups: int = of_size(0, default=0)
    """Groups a token chooses its experts from: those that score highest."""
    group_score: Literal["max", "top2"] = of_size("max", default="max")
    """How a group scores: as its best expert, or the sum of its two best."""
    first_dense_layers: int = of_size(0, default=0)
    """Layers at the bottom whose feed-forward is dense."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How the load is balanced: an auxiliary loss, a bias on the selection without a loss, or not at all."""
    balance_coefficient: float = 0.01
    """Weight of the auxiliary balance loss."""
    balance_scope: Literal["sequence", "global"] = "sequence"
    """Whose load the loss looks at: each packed sequence by itself, or all tokens of the optimizer step."""
    z_loss_coefficient: float = 0.0
    """Weight of the mean squared log-sum-exp of the router logits."""
    bias_rate: float = 0.001
    """Step of the selection bias under `balance = "bias"`."""
    capacity_factor: float | None = None
    """Tokens an expert takes in training, as a multiple of an even share; absent: dropless."""
    eval_capacity_factor: float | None = None
    """The same in evaluation and decoding, of each sequence by itself; absent: dropless."""
    drop_policy: Literal["probability", "position"] = "probability"
    """Over capacity, drop the least probable assignments or the latest tokens."""
    backend: str = "auto"
    """How the experts are multiplied, a file of `kernels/grouped_mm/`: all in one launch (`grouped_mm`), one after the
    other (`loop`), which takes any width and float64, or by the definition (`reference`). Or what goes from tokens to
    their weighted sums, a file of `kernels/experts/`: step by step (`torch`), or with Triton kernels around the
    products (`triton`), where no `parallel.expert` spreads the experts."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """`[model]`, resolved: everything that `build_model` needs, `[moe]` and `[mixer.*]` included."""

    family: str = "qwen2"
    """Model family; brings block choices and presets."""
    size: str = "debug"
    """Preset of the family."""
    mixer: str = "hgrn2"
    """Token mixer of the `L` layers."""
    layout: str = "L"
    """`L` (the mixer) and `N` (the family's softmax attention), repeated and cut to `num_layers`; patterns of Mamba-2
    hybrids, `M` (Mamba-2) and `*` (as `N`), are read too."""
    mixers: tuple[str, ...] = ()
    """One mixer name a layer; takes the place of `layout` when given."""
    feed_forwards: str = of_size("E", default="E")
    """What follows the mixer of a layer: `E` (experts; a dense feed-forward without `moe.num_experts`), `-` (a dense
    one) and `.` (nothing), repeated and cut to `num_layers`."""
    activation: Literal["swiglu", "relu2"] = of_size("swiglu", default="swiglu")
    """What feed-forwards and experts compute between their matrices: up times the SiLU of a gate, or, without a gate,
    the square of what of up is above zero."""
    hidden_size: int = of_size()
    """Model width."""
    num_layers: int = of_size()
    """Decoder layers."""
    num_heads: int = of_size()
    """Query heads of the softmax layers."""
    num_kv_heads: int = of_size()
    """Key and value heads of the softmax layers."""
    head_dim: int = of_size()
    """Width of a head of the softmax layers."""
    ffn_hidden_size: int = of_size()
    """Hidden width of the dense feed-forward, in layers without experts."""
    vocab_size: int = of_size()
    """Rows of the embedding and the output head; at least the tokenizer's size."""
    max_length: int = of_size()
    """Longest sequence a softmax layer keeps keys and values for when decoding, in tokens."""
    rope_theta: float = of_size()
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "llama3", "yarn"] = of_size("none")
    """How the softmax layers' rotary frequencies are slowed for contexts beyond the original length: as they are, as in
    Llama 3.1, or YaRN."""
    rope_factor: float = of_size(1.0)
    """The longest context over the original one: what slow frequencies are divided by."""
    rope_original_length: int = of_size(4096)
    """Tokens of the contexts the frequencies were made for."""
    rope_beta_slow: float = of_size(1.0)
    """Frequencies that turn less often over the original length are divided whole (Llama 3.1: low_freq_factor)."""
    rope_beta_fast: float = of_size(32.0)
    """Frequencies that turn more often are left alone (Llama 3.1: high_freq_factor)."""
    rope_mscale: float = of_size(0.0)
    """YaRN: sharpening of attention through the rotated channels; 0 with `rope_mscale_all_dim = 0` for the paper's."""
    rope_mscale_all_dim: float = of_size(0.0)
    """YaRN: the part of it that MLA applies to its scores as a whole."""
    norm_eps: float = of_size()
    """Epsilon of the RMS norms."""
    norm_offset: float = of_size(0.0, default=0.0)
    """What is added to the weights of the norms before and between layers and of softmax layers' queries and keys: 1
    for models that learn how far these are from one."""
    norm_placement: Literal["pre", "post", "stream"] = of_size("pre", default="pre")
    """Where the two norms of a layer stand: before what they feed, x + f(norm(x)); behind it, x + norm(f(x)) (OLMo 2);
    or in the stream itself, n + f(n) with n = norm(x) (MiniMax-01)."""
    attention_norm_placement: Literal["", "pre", "post", "stream"] = of_size("", default="")
    """The same of layers of softmax attention; empty: as in the other layers."""
    linear_scales: tuple[float, float] = of_size((1.0, 1.0), default=(1.0, 1.0))
    """What the stream, and what a linear mixer gives, are multiplied by before they are added (DeepNorm's alpha and
    beta)."""
    attention_scales: tuple[float, float] = of_size((1.0, 1.0), default=(1.0, 1.0))
    """The same of softmax attention."""
    ffn_scales: tuple[float, float] = of_size((1.0, 1.0), default=(1.0, 1.0))
    """The same of feed-forwards."""
    embed_scale: float = of_size(1.0, default=1.0)
    """What embeddings are multiplied by."""
    residual_scale: float = of_size(1.0, default=1.0)
    """What mixers and feed-forwards are multiplied by where they are added to the residual stream."""
    logit_divisor: float = of_size(1.0, default=1.0)
    """What logits are divided by."""
    tie_embeddings: bool = of_size()
    """Use the embedding as the output head."""
    init_std: float = of_size()
    """Standard deviation of the initial weights; output projections use it over sqrt(2 num_layers)."""
    embed_init_std: float | None = None
    """Standard deviation of the initial embeddings, where the head has weights of its own; absent: `init_std`. Beside
    outputs that are normed before their projection 0.5 learns sooner (KDA, DeltaNet, GSA above all)."""
    attention_backend: str = "auto"
    """Kernel of the softmax layers, a file of `kernels/attention/`: torch SDPA with masks (`sdpa`), FlashAttention over
    packed documents (`varlen`), FlexAttention (`flex`), cuDNN where rows are single documents (`cudnn`), packages of
    FlashAttention-3 and 4 (`flash3`, `flash4`), or the definition (`reference`)."""
    kernel_backend: str = "auto"
    """Kernels of the linear mixers: chunk-parallel PyTorch, the definitions token by token, flash-linear-attention or
    mamba-ssm; `auto` decides operator by operator, and takes `torch` inside torch.compile."""
    moe: MoERecipe
    """The `[moe]` section."""
    mixer_options: dict[str, Any] = field(default_factory=dict)
    """`[mixer.NAME]` sections: the options object of every registered mixer."""

    @property
    def embed_std(self) -> float:
        """Standard deviation of the initial embeddings. A head that shares them wants `init_std`."""
        return self.init_std if self.tie_embeddings or self.embed_init_std is None else self.embed_init_std


@dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """An entry of `data.sources`."""

    path: str
    """A file, a folder or a glob, as in `data.paths`."""
    weight: float = 1.0
    """Its share of the training tokens, beside the weights of the others."""
    split: Literal["both", "train", "validation"] = "both"
    """Whether `data.validation_fraction` of it is held out, nothing, or all of it, with a curve of its own."""


@dataclass(frozen=True, kw_only=True)
class RecallRecipe:
    """An entry of `data.recall`."""

    pairs: int
    """Keys, each with a value, that a document lists and asks for."""
    length: int
    """Tokens of a document."""
    examples: int = 20_000
    """Different documents trained on; their counts are the shares of the entries."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """`[data]`: text and tokenizer."""

    paths: tuple[str, ...] = ()
    """Files or folders of text, JSONL or parquet; empty: the corpus, or the instructions, that ship with the
    project."""
    sources: tuple[SourceRecipe, ...] = ()
    """A mixture in place of `paths`: a list of `{path = ..., weight = ..., split = ...}`. Every step has the shares
    that the weights give; each source is gone through in epochs of its own."""
    text_key: str = "text"
    """Where JSON and parquet have the text; `a.b` for a nested key."""
    format: Literal["text", "messages", "recall"] = "text"
    """Text, every token of which is trained, JSONL or parquet of messages, of which the responses are, or multi-query
    associative recall, made here, of which the answers are."""
    recall: tuple[RecallRecipe, ...] = ()
    """What documents of recall are: a list of `{pairs = ..., length = ..., examples = ...}`. A packed sequence holds
    documents of one entry."""
    recall_vocabulary: int = 8192
    """Ids of recall: the lower half, but 0, are keys, the upper half values."""
    recall_fill: Literal["random", "zero"] = "random"
    """What stands between the questions of recall: any id, or 0."""
    recall_seed: int = 0
    """Which documents of recall: each is a function of this, of its entry and of its number."""
    chat_template: str = "chatml"
    """How messages are written: `chatml`, `plain`, `tools` (chatml with calls of tools), `tokenizer` for the Jinja
    template that lies with the tokenizer, or a template file, TOML or `.jinja`."""
    trained_roles: tuple[str, ...] = ("assistant",)
    """The roles whose messages are trained."""
    tokenizer: str = ""
    """A tiktoken-format file or a Hugging Face `tokenizer.json`; empty: the one that lies with
    `checkpoint.init_from`, else the BPE that ships with the project."""
    begin_of_text: bool | None = None
    """Documents and conversations start with the tokenizer's begin-of-text token; absent: they do where it has one,
    unless folders of tokens, or the checkpoint of `checkpoint.init_from`, were made without. Where they do not, they
    start with the end of text."""
    validation_fraction: float = 0.05
    """Share of the documents held out from training; 0 goes without validation."""
    validation_paths: tuple[str, ...] = ()
    """Files or folders to validate on besides, each with a curve of its own, `validation_loss/NAME`: `NAME=PATH`, or a
    path whose last part is the name."""
    validation_split: Literal["documents", "tokens"] = "documents"
    """What it is a share of: whole documents, chosen by their text, or the last tokens of the text, inside a document
    perhaps, which a single one can be split by."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How training documents fill sequences: one after the other and cut where a sequence ends, without padding; or
    whole where they fit into a sequence, which leaves some padding. Conversations are never cut: one after the other,
    or so that they leave less padding. Held-out text is always read one after the other."""
    min_length: int = 0
    """Leaves out documents of fewer tokens, those that begin and end them counted; not of `validation_paths`."""
    workers: int = 0
    """Loader processes a rank."""
    cache: str = ""
    """Folder of the tokenised text; empty: `cache` in the run's folder."""
    on_change: Literal["refuse", "restart_epoch"] = "refuse"
    """What a run does that goes on and finds other documents: `refuse`; or `restart_epoch`, go on at its step and count
    of tokens with a fresh shuffle of all of the new documents, some of which it may have seen."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """`[training]`: how long, how much at a time, on what."""

    steps: int | None = None
    """Optimizer steps; give this or `tokens`."""
    tokens: int | None = None
    """Training tokens; give this or `steps`."""
    sequence_length: int = 2048
    """Tokens of a packed sequence."""
    micro_batch_size: int = 1
    """Sequences a data rank takes through one forward."""
    tokens_per_step: int | None = None
    """Tokens of one optimizer step over all ranks; absent: one micro-batch a data rank."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    output_dir: str = "runs/default"
    """Where the run writes its recipe, metrics and checkpoints."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; masters, states, router and decays stay float32. `auto`: bfloat16 on GPUs, else float32."""
    float8: Literal["none", "rowwise"] = "none"
    """Compute the projections of mixers and the dense and shared feed-forwards in float8, by torchao's scaling of rows.
    Routers, decays, embedding, head and routed experts stay as they are, and so do weights and checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; `auto` takes a GPU when there is one."""
    compile: bool = False
    """Compile the model's regions with torch.compile."""
    compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend of torch.compile."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What is computed again in the backward to save memory: nothing, whole layers, or layers but for their dense
    matrix products, attention and routing."""
    activation_checkpointing_every: int = 1
    """Checkpoint every n-th layer, the first one included."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    deterministic: bool = False
    """Take torch's deterministic algorithms, so that two runs on a GPU are equal bit for bit: attention's backward, the
    embedding's and sums by index are other ones then."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; needs `tokens_per_step` where `tokens` says how long."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None and self.tokens_per_step is not None
        return math.ceil(self.tokens / self.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """`[optimizer]`: the optimizer and its schedule."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the last step."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; give this or `warmup_tokens`."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up, rounded up to whole steps."""
    decay_fraction: float = 0.2
    """Share of the steps in which `wsd` decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decays."""
    eps: float = 1e-8
    """Adam's epsilon."""
    states: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's two moments; bfloat16 halves them, rounded by chance so that small changes are not lost."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (not of norms, biases, decay parameters and
    RWKV's low-rank factors)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 for never."""

    def warmup(self, tokens_per_step: int) -> int:
        """Steps of linear warm-up."""
        if self.warmup_tokens is not None:
            return math.ceil(self.warmup_tokens / tokens_per_step)
        return self.warmup_steps or 0


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    """`[parallel]`: degrees. World = pipeline x data_replicate x data_shard x context x tensor."""

    data_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    data_shard: int = -1
    """Ranks that share one copy of the weights (FSDP); -1 takes what is left."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    context: int = 1
    """Ranks that share a sequence, each with one contiguous span of it."""
    context_attention: Literal["auto", "gather", "heads"] = "auto"
    """How softmax layers see other spans: `gather` keys and values, or trade spans for `heads`, where the key-value
    heads divide; `auto` takes heads where it can, unless a window makes the gather small."""
    context_states: Literal["float32", "bfloat16"] = "float32"
    """Type in which the states of linear layers travel between spans."""
    expert: int = 1
    """Ranks that share the experts; borrowed from data_shard x context x tensor."""
    pipeline: int = 1
    """Ranks that share the layers, consecutive runs of them."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """In which order forwards and backwards run: one stage a rank; several a rank; or two a rank in a V, each backward
    in two parts (ZB-V)."""
    pipeline_stages_per_rank: int = 0
    """Stages a rank has; 0 takes what the schedule needs: 1, 2 and 2."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward (ZeRO-3); false keeps them (ZeRO-2)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients of bfloat16 weights are summed over ranks, and over micro-batches before; float32 never
    loses small ones, bfloat16 sends half as much. Shards and masters stay float32."""

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of each rank."""
        return self.pipeline_stages_per_rank or (1 if self.pipeline_schedule == "1f1b" else 2)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """`[checkpoint]`: when to save, how many to keep, from where to go on."""

    interval: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 3
    """Newest checkpoints kept."""
    resume: str = "latest"
    """`latest`: the newest sound one in `output_dir`, else start fresh; `never`: refuse a used folder; or a path."""
    asynchronous: bool = True
    """Write while training goes on."""
    init_from: str = ""
    """Hugging Face directory or checkpoint whose weights a fresh run starts from, as far as they fit the model; empty:
    from random values."""
    upcycle_noise: float = 0.0
    """Standard deviation of the noise that tells experts apart which start as copies of one dense feed-forward."""


@dataclass(frozen=True, kw_only=True)
class MetricsRecipe:
    """`[metrics]`: what is watched."""

    interval: int = 10
    """Steps between logged lines."""
    validation_interval: int = 0
    """Steps between validations; 0 validates only at the end."""
    validation_batches: int = 0
    """Micro-batches a rank of one validation; 0 takes the whole held-out split."""
    validation_accuracy: bool = False
    """Measure in validations also the share of labels that are the model's most probable token."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str = ""
    """Project of Weights & Biases that gets the figures too; empty: none."""
    baselines: bool = False
    """Print the held-out loss of uniform, unigram and bigram models at the start and compare with them at the end."""
    mixer_ablation: bool = False
    """At the end, measure the held-out loss with every mixer's output set to zero."""
    peak_tflops: float | None = None
    """Peak of one device for MFU, in TFLOP/s; absent: from a table by device name."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of a torch.profiler trace."""
    memory_snapshot_step: int | None = None
    """Write a CUDA memory snapshot after this step."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """`[evaluation]`: tasks of lm-eval that the model is asked while it trains."""

    tasks: tuple[str, ...] = ()
    """What `evaluate --tasks` takes: names of lm-eval's tasks, files of task YAML, `local`; empty: none."""
    interval: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    num_fewshot: int | None = None
    """Examples before each question; absent: as the task says."""
    limit: float | None = None
    """Questions of each task at most, below 1 their share; absent: all."""
    batch_tokens: int = 8192
    """Tokens that are read at once, on each rank."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. `load_recipe` makes one; `parse.dump` writes it back as TOML."""

    model: ModelRecipe
    data: DataRecipe
    training: TrainingRecipe
    optimizer: OptimizerRecipe
    parallel: ParallelRecipe
    checkpoint: CheckpointRecipe
    metrics: MetricsRecipe
    evaluation: EvaluationRecipe
