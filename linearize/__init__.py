"""linearize: turns a pretrained causal language model into a linear-time, constant-memory one.

Importing the package registers the linearized classes with transformers, as soon as transformers is imported, so that
AutoModelForCausalLM.from_pretrained loads converted checkpoints. The import itself stays light: the command line
answers `--help` without loading torch.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(module) -> None:
    from linearize.modeling.export import register_all

    register_all()
