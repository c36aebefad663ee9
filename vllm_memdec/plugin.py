"""What vLLM calls in every process it starts: make `--model-impl memdec` known, or stop vLLM.

vLLM logs an exception raised while IMPORTING a plugin and goes on without it, which would serve the
bare base. An exception raised INSIDE register() stops it. So this module imports only the standard
library, and everything that can fail happens in register().
"""

import re

OLDEST, BELOW = (0, 32), (0, 34)  # the releases that compat/ was checked against


def check_version(version: str) -> None:
    """Raise RuntimeError unless this release was checked against that version of vLLM."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST <= (int(match[1]), int(match[2])) < BELOW:
        raise RuntimeError(
            f"vllm-memdec supports vLLM >= {OLDEST[0]}.{OLDEST[1]} and < {BELOW[0]}.{BELOW[1]}, "
            f"but this is vLLM {version}: install a supported one, or uninstall vllm-memdec."
        )


def register() -> None:
    """Register the composite and hook the front end; calling it again changes nothing."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"vllm-memdec needs vLLM ({error}): pip install 'vllm-memdec[cpu]', or [cuda]."
        ) from error
    check_version(vllm.__version__)
    try:
        from vllm_memdec.compat import (
            draft_config,
            figures,
            front_end,
            multimodal,
            scheduler,
            slots,
        )
        from vllm_memdec.config import ARCHITECTURE
    except ImportError as error:
        raise RuntimeError(
            f"vllm-memdec cannot be imported ({error}): reinstall it, or uninstall it."
        ) from error
    vllm.ModelRegistry.register_model(ARCHITECTURE, f"vllm_memdec.model:{ARCHITECTURE}")
    front_end.install()
    draft_config.install()
    multimodal.install()
    scheduler.install()
    figures.install()
    slots.install()
