"""What rounding costs in one bf16 projection with an adapter, by how large the adapter's output is."""

import torch

SHARES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # of an adapter's output beside the product's


def layer(device: torch.device, size: int = 1024, rank: int = 16) -> list[dict[str, float]]:
    """How much of an adapter's output is left, and the error over its norm, a row for each share of the output in all.

    What is `kept` is the adapter's output in the result, as a factor: an addend below half a step of a number that is
    rounded already goes lost, every time; added before the one rounding it moves the rounding as often as it must, and
    all of it is there on average.

    Operands are the same bf16 numbers in all; fp64 is what they are compared with. `rounding` is what rounding the
    exact result once costs, which none can go below. `one product` is the fused engine's, `base added` the reference
    engine's on a GPU: the base's product is added to the adapter's in fp32. `adapter added` is the other way round, and
    `added in bf16` PEFT's.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    x, weight, down, up = normal(size, size), normal(size, size), normal(rank, size), normal(size, rank)
    product = x.double() @ weight.double().T
    rows = []
    for share in SHARES:
        exact = x.double() @ down.double().T @ up.double().T
        scaled = (up.double() * share * product.norm() / exact.norm()).bfloat16()
        exact = x.double() @ down.double().T @ scaled.double().T
        low_rank = x @ down.T
        wide, both = torch.cat([x, low_rank], 1), torch.cat([weight, scaled], 1)
        found = {
            "rounding": (product + exact).bfloat16(),
            "one product": wide @ both.T,
            "base added": (low_rank @ scaled.T).addmm_(x, weight.T),
            "adapter added": (x @ weight.T).addmm_(low_rank, scaled.T),
            "added in bf16": x @ weight.T + low_rank @ scaled.T,
        }
        added = {name: each.double() - product for name, each in found.items()}
        row = {name: float((each - exact).norm() / exact.norm()) for name, each in added.items()}
        row |= {f"{name}, kept": float((each * exact).sum() / exact.square().sum()) for name, each in added.items()}
        rows.append({"share": share, **row})
    return rows
