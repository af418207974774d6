"""How many rows of a PAG pipeline's batch are one branch's."""

from __future__ import annotations


def rows_of_a_branch(rows: int, before: int, pictures: int, branches: int) -> int:
    """The rows of each branch in a batch of ``rows`` rows.

    Args:
        before: what they were in the forward before; 0 in the first.
        pictures: how many latents the loop has; 0 where that does not show.
        branches: of the first forward.

    Raises:
        ValueError: a first batch that is not ``branches`` times the pictures.
    """
    fits = pictures and rows in (pictures, 2 * pictures, 3 * pictures)
    if before:
        # a callback may have left some of the pictures in the batch
        return pictures if fits else before
    found = rows // branches
    if not found:
        raise ValueError(
            f"The denoiser was called with {rows} rows, fewer than the {branches} branches of this "
            "call: there should be a row of latents for each picture."
        )
    if fits and found != pictures:
        raise ValueError(
            f"The denoiser was called with {rows} rows, which are not {branches} branches of "
            f"{pictures} pictures: embeddings that are given should have a row for each picture, "
            "and num_images_per_prompt should be 1."
        )
    return found
