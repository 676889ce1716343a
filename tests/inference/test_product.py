import pytest
import torch

from megamtp.inference.product import Product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)], ids=["wide", "tall", "square"])
def test_the_product_for_any_number_of_rows(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    product, tolerance = Product(weight.to(dtype)), {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.2}
    for rows in [(1, 1), (1, 2), (3, 1), (1, 4), (2, 3), (8, 1), (5, 7)]:
        x = torch.randn(*rows, shape[1], generator=generator, dtype=torch.float64)
        for got, wanted in [
            (product(x.to(dtype)), x @ weight.t()),
            (product.outputs(2, 5)(x.to(dtype)), x @ weight[2:5].t()),
            (product.outputs(3)(x.to(dtype)), x @ weight[3:].t()),
        ]:
            assert got.shape == wanted.shape and got.dtype == dtype
            assert (got.double() - wanted).abs().max() < tolerance[dtype]


def test_a_strided_input():
    weight, x = torch.randn(24, 8), torch.randn(2, 4, 16)[:, :, ::2]
    for part in (x, x[:, :2], x[:1, :1]):
        assert torch.allclose(Product(weight)(part), part @ weight.t(), atol=1e-5)
