"""The sizes of a dense decoder from which its weights, its KV cache and its matrix products can be counted."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from bench import rollout_models

ATTENTION_LAYERS = ("full_attention", "sliding_attention")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MLP_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers are all alike: attention over keys and values, and an MLP that every token passes.

    Attributes:
        tied: the output head is the embedding.
        dtype_bytes: of a weight as it is stored, of its gradient and of each of its two moments.
        compute_bytes: of a value as it is multiplied, and of the KV cache; None is `dtype_bytes`. They differ under autocast.
        mlp_matrices: (hidden, intermediate) products of an MLP: 3 with a gate, 2 without.
        layer_vectors: norms and biases of one layer, in weights.
        final_vectors: those outside the layers.
        position_weights: learned position embeddings, of which a token takes a row.
        has_head_norms: queries and keys are normed head by head.
        window: tokens that `window_layers` of the layers see, their own included.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    dtype_bytes: int
    compute_bytes: int | None = None
    mlp_matrices: int = 3
    layer_vectors: int = 0
    final_vectors: int = 0
    position_weights: int = 0
    has_head_norms: bool = False
    window: int | None = None
    window_layers: int = 0

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab_size", "dtype_bytes")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads {self.kv_heads}, got {self.heads}")
        if (self.window is None) != (self.window_layers == 0) or self.window_layers > self.layers:
            raise ValueError(
                f"window_layers must be 0 without a window and 1 to {self.layers} with one, got {self.window_layers}"
            )

    @classmethod
    def of(
        cls, config: PreTrainedConfig, dtype: torch.dtype | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> "ModelShape":
        """Read a config; `dtype` is that of the weights (None: the config's), `compute_dtype` that of autocast.

        The model is built on the meta device, without memory, and what its config says is held against its weights.

        Raises:
            ValueError: no dense decoder with attention in every layer, or no dtype.
        """
        config, kind = deepcopy(config.get_text_config()), type(config).__name__  # building a model writes into it
        dtype = dtype or getattr(config, "dtype", None)
        if dtype is None:
            raise ValueError(f"dtype must be given for a config that names none, got {kind}")
        check_is_dense_decoder(config, kind)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        layers, heads, hidden = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        intermediate = next(
            (size for size in (getattr(config, name, None) for name in MLP_SIZES) if size is not None), 4 * hidden
        )
        inside = layer_parameters(model, layers, kind)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        known = {id(embedding), id(head), *(id(parameter) for parameter in inside.values())}
        outside = {name: p for name, p in model.named_parameters() if id(p) not in known}
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        matrices = sum(p.numel() for p in inside.values() if p.ndim > 1)
        vectors = sum(p.numel() for p in inside.values() if p.ndim == 1)
        mlp_matrices = (matrices - layers * attention) / (layers * hidden * intermediate)
        if mlp_matrices not in (2, 3) or vectors % layers or embedding.shape != head.shape:
            raise ValueError(
                f"a shape needs layers of attention and one MLP: {kind} has {matrices} weights in the matrices of its layers, "
                f"which {layers} layers of {heads} and {kv_heads} heads of {head_dim} and an MLP of {intermediate} do not give"
            )
        windows = layer_windows(config)
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=head.shape[0],
            tied=embedding is head,
            dtype_bytes=dtype.itemsize,
            compute_bytes=None if compute_dtype is None else compute_dtype.itemsize,
            mlp_matrices=int(mlp_matrices),
            layer_vectors=vectors // layers,
            final_vectors=sum(p.numel() for p in outside.values() if p.ndim == 1),
            position_weights=sum(p.numel() for p in outside.values() if p.ndim > 1),
            has_head_norms=any("q_norm" in name for name in inside),
            window=config.sliding_window if windows else None,
            window_layers=windows,
        )

    @property
    def value_bytes(self) -> int:
        """Of a value as it is multiplied."""
        return self.compute_bytes or self.dtype_bytes

    @property
    def layer_matrices(self) -> int:
        """Weights in the matrices of one layer: those of query, key, value and output, and of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.hidden

    @property
    def body_weights(self) -> int:
        """All that a token passes between its embedding and the output head."""
        return self.layers * (self.layer_matrices + self.layer_vectors) + self.final_vectors

    def parameters(self) -> int:
        """Every weight once; a tied head is its embedding."""
        return self.body_weights + (1 if self.tied else 2) * self.head_weights + self.position_weights

    def trained_parameters(self, is_head_trained: bool = True) -> int:
        """Without the head where that is frozen, which for a tied head is the embedding too."""
        return self.parameters() - (0 if is_head_trained else self.head_weights)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * self.cache_bytes_per_layer

    @property
    def cache_bytes_per_layer(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.value_bytes

    @property
    def layer_kinds(self) -> tuple[tuple[int, float], ...]:
        """(how many layers, tokens that they see at most)."""
        return (self.layers - self.window_layers, float("inf")), (self.window_layers, self.window or 1)


def check_is_dense_decoder(config: PreTrainedConfig, kind: str) -> None:
    """Raises ValueError that says what `config` has which a `ModelShape` does not count."""
    for name in EXPERT_COUNTS:
        if (getattr(config, name, None) or 0) > 1:
            raise ValueError(f"a shape needs a dense decoder, got {kind} with {name} {getattr(config, name)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"a shape needs a decoder alone, got the encoder and decoder of {kind}")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"a shape needs a decoder with attention in every layer, got {kind} without {name}")
    if any(isinstance(getattr(config, name, None), (list, tuple)) for name in MLP_SIZES):
        raise ValueError(f"a shape needs layers that are all alike, got {kind} with MLPs of several sizes")
    others = set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS)
    if others:
        raise ValueError(
            f"a shape needs layers among {', '.join(ATTENTION_LAYERS)}, got {kind} with {', '.join(sorted(others))}"
        )


def layer_parameters(model: torch.nn.Module, layers: int, kind: str) -> dict[str, torch.nn.Parameter]:
    """The weights of the list of decoder layers by name."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return dict(module.named_parameters())
    raise ValueError(f"a shape needs a list of {layers} decoder layers, got none in {kind}")


def layer_windows(config: PreTrainedConfig) -> int:
    """How many layers see a window alone."""
    types = getattr(config, "layer_types", None)
    if types:
        return sum(kind == "sliding_attention" for kind in types)
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config.num_hidden_layers if has_window else 0


def load_shape(name: str, option: str, dtype: str, *, is_autocast: bool = False) -> ModelShape:
    """A shape of bench/rollout_models.py by its name, or that of a config.json in a folder or on the hub.

    Args:
        dtype: "float32" or "bfloat16", in which is computed and, without `is_autocast`, stored.
        is_autocast: the weights are float32.

    Raises:
        ValueError: an unknown model, or one that cannot be counted; the message names `option`.
    """
    if name in rollout_models.SHAPES:
        config = Qwen3Config(**(rollout_models.QWEN3 | rollout_models.SHAPES[name]))
    else:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{option} must be among {', '.join(rollout_models.SHAPES)}, or a folder or hub id with a config.json, "
                f"got {name!r} ({first_line})"
            ) from error
    compute = getattr(torch, dtype)
    try:
        return ModelShape.of(config, torch.float32 if is_autocast else compute, compute_dtype=compute)
    except ValueError as error:
        raise ValueError(f"{option}: {error}, in {name!r}") from error
