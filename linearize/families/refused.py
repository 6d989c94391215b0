"""Models that cannot be converted, and why, by their config.json. Imports neither torch nor transformers."""

from linearize.families.family import FULL, SLIDING, Settings

NO_INTERFACE = "its attention does not go through the attention interface of transformers, so it cannot be replaced"
LINEAR = "it is linear or hybrid already: most of its layers keep a state in place of keys and values"
LATENT = "its attention caches a latent in place of keys and values, so there is no key to gate by"
ENCODER = "it is an encoder, which reads in both directions; only decoders are converted"
ENCODER_DECODER = "it is an encoder-decoder; only decoders alone are converted"

_REASONS: dict[str, tuple[str, ...]] = {
    "its attention drops the keyword arguments that a linearized layer needs": ("gpt2",),
    NO_INTERFACE: ("gpt_neo", "gptj", "falcon", "mpt", "bloom", "codegen"),
    LINEAR: (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2",
        "qwen3_next", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe", "xlstm", "minimax", "kimi_linear",
        "olmo_hybrid",
    ),
    LATENT: ("deepseek_v2", "deepseek_v3", "minicpm3"),
    ENCODER: (
        "bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "modernbert", "xlm-roberta",
        "camembert", "mpnet",
    ),
    ENCODER_DECODER: ("t5", "mt5", "bart", "mbart", "pegasus", "marian", "whisper", "led"),
}  # fmt: skip
REFUSED: dict[str, str] = {model_type: why for why, types in _REASONS.items() for model_type in types}


def reason_to_refuse(config: Settings) -> str | None:
    """Return why a model with this config.json cannot be converted, or None if nothing in it forbids it."""
    model_type = str(config.get("model_type"))
    if model_type in REFUSED:
        return REFUSED[model_type]
    if config.get("is_encoder_decoder"):
        return ENCODER_DECODER
    if isinstance(inner := config.get("text_config"), dict):
        return (
            f"it wraps the text model {inner.get('model_type', '(unnamed)')} for other inputs; --text-model takes that "
            "one out and converts it"
        )
    layer_types = config.get("layer_types") or ()
    other_types = set(map(str, layer_types)) - {FULL, SLIDING} if isinstance(layer_types, list | tuple) else set()
    if "chunked_attention" in other_types:
        return "some of its layers attend within chunks, which is not supported"
    return LINEAR if other_types else None
