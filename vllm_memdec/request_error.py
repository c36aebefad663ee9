"""The error of a request: HTTP 400 to a client, and the ValueError it is to a caller of LLM."""

from vllm.exceptions import VLLMValidationError


class RequestError(VLLMValidationError, ValueError):
    """What a request asks for is wrong; the sentence says what and the remedy."""
