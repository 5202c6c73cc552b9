"""Which form of a computation is cheapest, decided from shapes.

Multiplications are counted; a block is (out, in) = (o, i) with T positions.

A per-example gradient D = sum_t l_t r_t^T can be used in three forms:

- *per-example form*: make D (T o i), then work on it.
- *Gram form*: never make it; <D, D'> = sum_{t,t'} (l_t . l'_t') (r_t . r'_t') costs T T' (o + i) a pair, against o i with D made.
  Better when T T' (o + i) < o i: always for T = T' = 1, rarely for sequences.
- *products of squares* (T = 1): the squares of D's entries are (l_a)^2 (r_b)^2, so a sum over examples of squares is a single matrix
  product of squared rows, o i an example, and no D is made.
"""

from __future__ import annotations


def rows_first(positions: int, out: int, in_: int) -> bool:
    """Whether U^T D W is cheaper by rotating the rows (T (o^2 + i^2) + T o i) than by rotating D (T o i + o i (o + i))."""
    return positions * (out * out + in_ * in_) < out * in_ * (out + in_)


def gram_form(rank: int, positions: int, out: int, in_: int) -> bool:
    """Whether an inner product with a direction of `rank` terms is cheaper term by term: rank T (o + i) < o i."""
    return rank * positions * (out + in_) < out * in_


def rows_smaller(positions: int, out: int, in_: int) -> bool:
    """Whether the rows of a gradient take less memory than its matrix: T (o + i) < o i."""
    return positions * (out + in_) < out * in_


def by_terms(rank: int, positions: int, queries: int, batch: int, out: int, in_: int) -> bool:
    """Whether a batch meets directions of `rank` terms term by term, or as matrices, which are made of the terms as they are needed.

    A pair's share: rank T (o + i) term by term; else o i, of making the matrices rank o i / batch, of making the gradients T o i / queries.
    """
    return rank * positions * (out + in_) < out * in_ * (1 + rank / max(batch, 1) + positions / max(queries, 1))
