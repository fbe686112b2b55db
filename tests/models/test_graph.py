"""The walk over the autograd graph, against graphs small enough to list."""

from __future__ import annotations

import torch

from indistill.models.graph import walk


def leaves(root):
    return {node.variable for node in walk(root) if hasattr(node, "variable")}


def test_every_node_comes_once():
    a, b, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    product = a * b
    loss = (product.exp() + product).sum()
    nodes = list(walk(loss.grad_fn))
    assert nodes[0] == loss.grad_fn
    assert len(nodes) == len(set(nodes)) == 6  # sum, addition, exponential, product, and the two leaves
    assert product.grad_fn in nodes
    assert leaves(loss.grad_fn) == {a, b}
    assert unused not in leaves(loss.grad_fn)


def test_it_does_not_pass_the_nodes_where_it_ends():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    inner = a.exp()
    loss = (inner * b).sum()
    nodes = list(walk(loss.grad_fn, ends_at=lambda node: node == inner.grad_fn))
    assert inner.grad_fn in nodes
    assert {node.variable for node in nodes if hasattr(node, "variable")} == {b}


def test_nothing_leads_nowhere():
    assert list(walk(None)) == []
    assert list(walk(torch.ones(1).grad_fn)) == []
