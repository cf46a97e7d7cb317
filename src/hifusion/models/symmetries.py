"""The eight symmetries of a square image, and predictions averaged over them."""

from collections.abc import Callable, Iterator

from torch import Tensor


def eight_symmetries(images: Tensor) -> Iterator[Tensor]:
    """Images turned and mirrored in all eight ways, each (B, C, S, S).

    The order is ST-Net's: for i in (as is, mirrored left-right), for j in (as is, mirrored top-bottom), for k in (as
    is, turned by 90 degrees counter-clockwise); k is applied first, then j, then i.
    """
    for left_right in (False, True):
        for top_bottom in (False, True):
            for turned in (False, True):
                image = images.rot90(1, (-2, -1)) if turned else images
                axes = [axis for axis, flipped in ((-2, top_bottom), (-1, left_right)) if flipped]
                yield image.flip(axes) if axes else image


def mean_over_symmetries(predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean of the predictions (B, G) of the eight symmetric copies of images (B, C, S, S), one copy at a time.

    Parameters
    ----------
    predict
        Images -> predictions; for a network `model` it is `lambda region: model(region).expression`.
    """
    predictions = [predict(image) for image in eight_symmetries(images)]
    total = predictions[0]
    for prediction in predictions[1:]:
        total = total + prediction
    return total / len(predictions)
