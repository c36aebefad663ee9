"""Memory Decoder for vLLM: serve a base model and a small memory of a corpus as one model.

vLLM imports this module in every process it starts, so it uses the standard library only.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: make `--model-impl memdec` known to vLLM."""
    from vllm_memdec.plugin import register

    register()
