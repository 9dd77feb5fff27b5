"""Every matrix of a file is found by its layer's name."""

import pytest

reason = "there is no wheel of ExecuTorch for this machine"
pytest.importorskip("executorch.runtime", reason=reason)

import torch  # noqa: E402

from companion import QuantScheme, convert, export_executorch, prepare_qat  # noqa: E402
from companion.errors import DamagedFile  # noqa: E402
from companion.formats.executorch.stored import read_executorch  # noqa: E402
from companion.numerics.packing import unpack  # noqa: E402
from companion.qat.packed import Packed  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.mark.parametrize("bits", [3, 8])
def test_layers_and_embedding_by_name(bits, tmp_path):
    model = tiny.llama(tiny.byte_level())  # its embedding is not tied
    scheme = QuantScheme(bits, 32 if bits < 5 else None, torch.bfloat16)
    q = convert(prepare_qat(model, scheme, "absmax", embeddings=True))
    path = export_executorch(q, tmp_path / "model.pte", max_length=8)
    found = read_executorch(path, q)
    layers = {name: layer for name, layer in q.named_modules() if isinstance(layer, Packed)}
    assert found.keys() == layers.keys()
    assert len(found) == 9
    for name, layer in layers.items():
        ours = unpack(layer.integers, bits, layer.columns)
        assert torch.equal(torch.from_numpy(found[name].integers), ours)
        assert torch.equal(torch.from_numpy(found[name].scales), layer.scale.float())


def test_what_is_no_such_file_is_refused(tmp_path):
    (tmp_path / "a.pte").write_bytes(b"no file of ExecuTorch" * 9)
    with pytest.raises(DamagedFile, match="is no whole file of ExecuTorch"):
        read_executorch(tmp_path / "a.pte", torch.nn.Identity())
