"""vLLM as an engine for answers; perfit plugs into it and leaves its code as it is.

`engine` is what the service talks to. It drives vLLM's engine core, which `core` starts in this process.
Where a model is divided, vLLM's workers are `processes` of their own: `weights` are how they get those,
`messages` what goes to and fro. vLLM loads `plugin`, which lets `worker` shift the rows of prompts and
overwrite what ended requests leave. `side_channel` is the memory by which tensors get there.
Nothing here is imported where vLLM is not installed.
"""
