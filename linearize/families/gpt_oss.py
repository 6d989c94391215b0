"""gpt-oss: a learned sink in every head's softmax, mixtures of experts."""

from linearize.families.family import family

GPT_OSS = family(
    "gpt_oss",
    "GptOss",
    masks_ignore_positions=True,
    experimental=(
        "released checkpoints are MXFP4 and have to be dequantised first; learned sinks add to the token sinks"
    ),
    covers="gpt-oss-20b, gpt-oss-120b",
)
