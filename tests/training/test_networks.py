"""The layers between pixels and hidden units."""

import pytest
import torch

from vsc_training.networks import conv_encoder, encode_both, mlp_encoder


@pytest.mark.parametrize("kind", ["mlp", "deep mlp", "conv"])
def test_both_together_are_encoded_as_each_by_itself(kind: str) -> None:
    """Values and gradients, in float64; and no gradient for the examples."""
    torch.manual_seed(0)
    shape = (8, 8, 3)
    encoder = {
        "mlp": lambda: mlp_encoder(shape, 16, 1),
        "deep mlp": lambda: mlp_encoder(shape, 16, 3),
        "conv": lambda: conv_encoder(shape, 4, 16),
    }[kind]().double()
    given = torch.rand(5, *shape, dtype=torch.float64)
    learned = torch.rand(3, *shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(8, 16, dtype=torch.float64)
    fitted = [learned, *encoder.parameters()]

    together = encode_both(encoder, given, learned)
    apart = torch.cat([encoder(given), encoder(learned)])
    torch.testing.assert_close(together, apart)
    gradients = torch.autograd.grad((together * direction).sum(), fitted)
    expected = torch.autograd.grad((apart * direction).sum(), fitted)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, right)


def test_one_product_for_both_runs_in_bfloat16_where_the_others_do() -> None:
    torch.manual_seed(0)
    encoder = mlp_encoder((8, 8, 1), 16, 1)
    given, learned = torch.rand(5, 8, 8, 1), torch.rand(3, 8, 8, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encode_both(encoder, given, learned)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert learned.grad is not None
    for parameter in (learned, *encoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    whole = encode_both(encoder, given, learned)
    torch.testing.assert_close(hidden.float(), whole, rtol=0.03, atol=0.03)
    of_learned, *_ = torch.autograd.grad(whole.square().sum(), [learned])
    torch.testing.assert_close(learned.grad, of_learned, rtol=0.1, atol=0.05)
