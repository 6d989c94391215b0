"""linearize: turns a pretrained causal language model into a linear-time, constant-memory one.

Importing the package makes AutoModelForCausalLM.from_pretrained load converted checkpoints, whether transformers is
imported before or after it. The import itself stays light: the command line answers `--help` without loading torch.
"""

from linearize.modeling.registration import register_on_import

__version__ = "0.1.0"

register_on_import()
