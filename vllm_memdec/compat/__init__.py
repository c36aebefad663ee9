"""All that wraps or exchanges private parts of vLLM: one file a seam.

Each file's docstring says what it wraps, why, when it may go and what it relies on. Beside it is
the record of that: SIGNATURES (parameters of what is wrapped, called or derived from), CHANGED
(those that a later release changed, in full, by release) and ATTRIBUTES (what is read of an
object). tests/serving/test_compat.py compares all records with the vLLM that is installed.

Checked by running vLLM 0.32.0, and 0.33.0's Python files over the compiled extensions of 0.32.0.
front_end.py, scheduler.py and server.py belong to the front end and the engine core, multimodal.py
to every process; only a worker that serves a composite imports the others.
"""
