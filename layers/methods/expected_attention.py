"""Expected Attention: what queries to come will look for."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.scorers import ExpectedAttention
from layers.methods.base import Allocate, Method


def build(
    *,
    allocator: Allocate = uniform,
    sinks: int = 4,
    recent: int = 1,
    future: int = 512,
    epsilon: float = 0.0,
    use_vnorm: bool = True,
    compat: bool = False,
) -> Method:
    """Keep the C tokens of every KV head that get the most attention from a normal distribution of queries to come.

    For each query head, mu and Sigma are mean and covariance of the queries before RoPE, without those of the first
    tokens. With n tokens seen and R the mean of the rotations at n ... n + 511, queries to come have mu' = R mu and
    Sigma' = R Sigma R^T. The logarithm of exp(q k_j / sqrt(D)), expected, is z_j = k_j mu' / sqrt(D) +
    k_j^T Sigma' k_j / (2 D), and the score is (mean over the group of softmax_j(z) + epsilon) |v_j|_2.

    The softmax is over all tokens that the next one sees. In a later turn, or a later chunk of a prompt, mu and Sigma
    are those of the new queries alone, since older ones are not stored. The paper protects the first tokens only; here
    the last one stays too. Another method that weighs values makes this one's weighing superfluous:
    `criticalkv+expected-attention:use_vnorm=false`.

    Args:
        allocator: budgets.
        sinks: first tokens, which are always kept and whose queries do not count.
        recent: last tokens that are always kept, >= 1.
        future: positions to come over which rotations are averaged, 1 to 2**20.
        epsilon: 0 as published, 0.01 where the paper lets heads compete (`allocator=adakv`).
        use_vnorm: multiply by the length of the value.
        compat: the published code: the softmax leaves out the first tokens, which changes how a group's heads count.

    Source:
        Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
        Distribution, 2025.

    Example:
        >>> build().least
        5
    """
    return Method(
        name="expected-attention",
        paper="Expected Attention, arXiv 2510.00636",
        summary="what queries like those so far will attend to, whatever is asked",
        attention=True,
        scorer=ExpectedAttention(sinks=sinks, future=future, epsilon=epsilon, use_vnorm=use_vnorm, compat=compat),
        allocator=allocator(least=sinks + recent),
        sinks=sinks,
        recent=recent,
    )
