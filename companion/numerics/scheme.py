"""What the integers look like: one validated, immutable description used everywhere.

Built in chapter 4.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from companion.errors import SchemeError

Granularity = Literal["token", "tensor", "block"]


@dataclass(frozen=True)
class Activations:
    """How the inputs of a layer are rounded while the model runs.

    Parameters
    ----------
    bits : int
        Width of one activation, 2 to 8.
    granularity : {"token", "tensor", "block"}
        What shares one scale: a row of features, the whole tensor, or a block of a row.
    symmetric : bool
        True puts the zero point at 0; False spends the grid on the range that occurs.
    range : tuple of int, optional
        The integers used, when they are fewer than `bits` allows: ``(0, 127)`` keeps
        8-bit products from saturating 16-bit accumulators on AVX2.

    Examples
    --------
    >>> Activations(bits=8, granularity="token").integers
    (-128, 127)
    >>> Activations(bits=8, granularity="tensor", range=(0, 127)).integers
    (0, 127)
    """

    bits: int = 8
    granularity: Granularity = "token"
    symmetric: bool = False
    range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.granularity not in ("token", "tensor", "block"):
            raise SchemeError(
                f"granularity {self.granularity!r} is unknown: use 'token', 'tensor' or 'block'"
            )
        if self.range is not None:
            low, high = self.range
            if not low <= 0 < high or high - low >= 2**self.bits:
                raise SchemeError(
                    f"range {self.range} must contain 0 and at most {2**self.bits} integers; "
                    f"leave it out for {integer_range(self.bits)}"
                )

    @property
    def integers(self) -> tuple[int, int]:
        """Smallest and largest integer in use."""
        return self.range or integer_range(self.bits)


@dataclass(frozen=True)
class QuantScheme:
    """The number format of a quantized layer: weights always, activations if asked.

    Weights are symmetric integers (zero point 0) and share one scale per group of
    neighbours along a row of the weight matrix.

    Parameters
    ----------
    weight_bits : int
        Width of one weight, 2 to 8.
    group_size : int, optional
        Weights that share a scale; None gives one scale per output row.
    scale_dtype : torch.dtype
        How the scales are stored: float16 (default), bfloat16 or float32.
    activations : Activations, optional
        None leaves activations in floating point (weight-only quantization).

    Raises
    ------
    SchemeError
        For a format that cannot exist, with the values that can.

    Examples
    --------
    >>> QuantScheme(weight_bits=4, group_size=32).integers
    (-8, 7)
    >>> QuantScheme(weight_bits=4, group_size=32).bits_per_weight(in_features=256)
    4.5
    """

    weight_bits: int = 4
    group_size: int | None = 32
    scale_dtype: torch.dtype = torch.float16
    activations: Activations | None = None

    def __post_init__(self) -> None:
        check_bits(self.weight_bits)
        if self.group_size is not None and (
            not isinstance(self.group_size, int) or self.group_size < 1
        ):
            raise SchemeError(
                f"group_size {self.group_size!r} must be a positive integer (32, 64 and 128 are "
                "usual) or None for one scale per row"
            )
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise SchemeError(
                f"scale_dtype {self.scale_dtype} cannot hold scales: use torch.float16, "
                "torch.bfloat16 or torch.float32"
            )
        if self.activations is not None and not isinstance(self.activations, Activations):
            raise SchemeError(
                f"activations must be Activations(...) or None, not {self.activations!r}"
            )

    @property
    def integers(self) -> tuple[int, int]:
        """Smallest and largest integer a weight can take."""
        return integer_range(self.weight_bits)

    def bits_per_weight(self, in_features: int) -> float:
        """Storage per weight, its share of the scale included, in bits."""
        size = in_features if self.group_size is None else self.group_size
        return self.weight_bits + 8 * self.scale_dtype.itemsize / size

    def to_dict(self) -> dict[str, Any]:
        """Describe the scheme in values that JSON keeps, so that `from_dict` brings it back.

        Examples
        --------
        >>> QuantScheme(4, 32).to_dict()
        {'weight_bits': 4, 'group_size': 32, 'scale_dtype': 'float16', 'activations': None}
        """
        saved = asdict(self) | {"scale_dtype": str(self.scale_dtype).removeprefix("torch.")}
        if self.activations is not None and self.activations.range is not None:
            saved["activations"]["range"] = list(self.activations.range)
        return saved

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> QuantScheme:
        """Build the scheme that `to_dict` described.

        Raises
        ------
        SchemeError
            If `saved` describes none.

        Examples
        --------
        >>> QuantScheme.from_dict(W8A8.to_dict()) == W8A8
        True
        """
        try:
            form = saved["activations"]
            if form is not None:
                form = Activations(**{**form, "range": form["range"] and tuple(form["range"])})
            scale_dtype = getattr(torch, saved["scale_dtype"])
            return cls(**{**saved, "scale_dtype": scale_dtype, "activations": form})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SchemeError(f"{saved!r} describes no scheme ({error})") from None


def integer_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Return the smallest and largest integer of a given width.

    Parameters
    ----------
    bits : int
        Width, 2 to 8.
    signed : bool
        Two's complement when True, counting from zero when False.

    Returns
    -------
    tuple of int
        ``(qmin, qmax)``, both included.

    Examples
    --------
    >>> integer_range(4), integer_range(7, signed=False)
    ((-8, 7), (0, 127))
    """
    check_bits(bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def parse_scheme(text: str) -> QuantScheme:
    """Read a scheme from its short name: weight bits, "A8" for 8-bit activations, the group.

    Parameters
    ----------
    text : str
        "W4" (groups of 32), "W4-g64", "W2-row", "W4A8" or "W8A8"; with "-bf16" at the end the scales
        are stored in bfloat16, as `export_executorch` wants them.

    Returns
    -------
    QuantScheme

    Raises
    ------
    SchemeError
        If it is none, with some that are.

    Examples
    --------
    >>> parse_scheme("W4") == W4, parse_scheme("W8A8") == W8A8
    (True, True)
    >>> parse_scheme("W2-row").group_size is None
    True
    >>> parse_scheme("W4-bf16").scale_dtype
    torch.bfloat16
    """
    found = re.fullmatch(r"W([2-8])(A8)?(?:[- ](?:g(\d+)|(row)))?(-bf16)?", text)
    if found is None:
        raise SchemeError(
            f"scheme {text!r} is unknown: write W4, W3 or W2 (groups of 32), W4-g64, W2-row for "
            "one scale per row, W4A8 or W8A8, and -bf16 behind it for scales in bfloat16"
        )
    bits, activations, group, row, brain = found.groups()
    dtype = torch.bfloat16 if brain else torch.float16
    if (bits, activations) == ("8", "A8") and group is None:
        return replace(W8A8, scale_dtype=dtype)
    return QuantScheme(
        int(bits),
        None if row else int(group or 32),
        dtype,
        activations=W4A8.activations if activations else None,
    )


def check_bits(bits: int) -> None:
    """Refuse a width outside 2 to 8 bits: one bit has no symmetric grid, nine no int8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise SchemeError(f"{' '.join(repr(bits).split())} bits: choose a whole number from 2 to 8")


BLOCK8 = Activations(8, "block", symmetric=True, range=(-127, 127))
"""Activations in blocks as long as the groups of the weights: what ONNX Runtime's kernels round
to at accuracy level 4."""
W8A8 = QuantScheme(8, None, activations=Activations(8, "tensor", range=(0, 127)))
"""8-bit weights per row, 8-bit activations per tensor: what fast int8 CPU kernels run."""
W8 = QuantScheme(8)
"""8-bit weights in groups of 32, activations in floating point."""
W4A8 = QuantScheme(4, activations=Activations(8, "token"))
"""4-bit weights in groups of 32, 8-bit activations per token."""
W4 = QuantScheme(4)
"""4-bit weights in groups of 32, activations in floating point."""
W3 = QuantScheme(3)
"""3-bit weights in groups of 32, activations in floating point."""
W2 = QuantScheme(2)
"""2-bit weights in groups of 32, activations in floating point."""
