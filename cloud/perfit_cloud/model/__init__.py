"""The frozen base model and what is done to its hidden states.

`base` loads it, `interventions` adds φ behind its blocks, `kv_cache` batches requests of different lengths,
and `partial` runs some of its blocks on some of its tokens. No module here knows a caller or a call.
"""
