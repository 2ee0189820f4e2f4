"""Open Inference Protocol v2: what `tritonclient` and KServe's clients speak.

`tensors` is the wire (JSON and the binary extension), `models` what is computed, `routes` the
addresses. https://github.com/kserve/open-inference-protocol, and Triton's extension
`binary_tensor_data`.
"""

from vsc_serve.service.v2.routes import router

__all__ = ["router"]
