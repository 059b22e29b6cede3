import dataclasses
import pickle

import numpy as np
import pytest
import torch

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.methods.terms import Answer
from raydmd.serving.codec import (
    decode_array,
    decode_reply,
    decode_request,
    encode_array,
    encode_reply,
    encode_request,
)
from raydmd.serving.messages import Reply, RewardRequest, ScoreRequest, WalkRequest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_values_dtype_and_shape_survive(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    back = decode_array(encode_array(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_every_bfloat16_bit_pattern_survives_nans_included() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wire = pickle.loads(pickle.dumps(encode_array(bits.view(torch.bfloat16))))
    assert wire["data"].dtype == np.uint16
    back = decode_array(wire)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_dimensions_empty_and_strided_tensors(dtype: torch.dtype) -> None:
    for tensor in (torch.tensor(1.5), torch.empty(0, 3), torch.randn(4, 6).T[::2]):
        back = decode_array(encode_array(tensor.to(dtype)))
        assert torch.equal(back, tensor.to(dtype))


def test_encoding_and_decoding_share_memory_where_they_can() -> None:
    tensor = torch.zeros(3)
    wire = encode_array(tensor)
    decoded = decode_array(wire)
    tensor[0] = 7
    assert wire["data"][0] == 7
    assert decoded[0] == 7


def test_read_only_arrays_are_taken_as_they_are() -> None:
    wire = encode_array(torch.arange(3.0).to(torch.bfloat16))
    wire["data"].flags.writeable = False
    tensor = decode_array(wire)
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert tensor.data_ptr() == wire["data"].ctypes.data


def test_tensors_with_gradient_are_sent_without_it() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert not decode_array(encode_array(tensor)).requires_grad


def test_request_and_reply_survive_and_the_wire_holds_no_tensor() -> None:
    request = ScoreRequest(
        x_t=torch.randn(2, 4, 3).bfloat16(),
        t=torch.tensor([0.9, 1.0]),
        conditions=(3, 0),
        guidance=Guidance(4.5),
        expert="high",
        name="cycle 1 rank 0",
    )
    wire = encode_request(request, "rank 0")
    raw = pickle.dumps(wire)
    assert b"torch" not in raw
    back = decode_request(pickle.loads(raw))
    assert wire["client"] == "rank 0"
    assert torch.equal(back.x_t, request.x_t)
    assert torch.equal(back.t, request.t)
    for field in ("conditions", "guidance", "expert", "name"):
        assert getattr(back, field) == getattr(request, field)

    reply = Reply(
        answer=Answer(value=torch.randn(2, 4), uncond=torch.ones(2, 4)),
        replica="teacher/0",
        seconds=0.25,
        batch_items=8,
    )
    raw = pickle.dumps(encode_reply(reply))
    assert b"torch" not in raw
    again = decode_reply(pickle.loads(raw))
    assert torch.equal(again.answer.value, reply.answer.value)
    assert torch.equal(again.answer.uncond, torch.ones(2, 4))
    assert (again.replica, again.seconds, again.batch_items) == ("teacher/0", 0.25, 8)


def test_every_kind_of_request_comes_back_as_it_was() -> None:
    x_t, guidance = torch.randn(2, 3), Guidance(2.5)
    for request in (
        ScoreRequest(x_t=x_t, t=torch.rand(2), conditions=(1, 2), guidance=guidance, expert="e", split=True, name="a"),
        WalkRequest(x_t=x_t, grid=(1.0, 0.5, 0.0), conditions=(1, 2), guidance=guidance, name="b"),
        RewardRequest(x_t=x_t, conditions=(3, 4), name="c"),
    ):
        back = decode_request(encode_request(request, "client"))
        assert type(back) is type(request)
        for field in dataclasses.fields(request):
            ours, theirs = getattr(request, field.name), getattr(back, field.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_large_tensors_are_lent_where_there_is_a_way() -> None:
    kept: list[torch.Tensor] = []

    def lend(tensor: torch.Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    large, small = torch.randn(1, 1 << 15), torch.randn(1, 4)
    for tensor, lent in ((large, True), (small, False)):
        request = RewardRequest(x_t=tensor, conditions=(0,))
        wire = pickle.loads(pickle.dumps(encode_request(request, "c", lend=lend)))
        assert (wire["x_t"]["lent"] is not None) is lent
        assert torch.equal(decode_request(wire, kept.__getitem__).x_t, tensor)
        reply = encode_reply(
            Reply(answer=Answer(value=tensor, uncond=tensor), replica="r", seconds=0.0, batch_items=1), lend
        )
        again = decode_reply(pickle.loads(pickle.dumps(reply)), kept.__getitem__)
        assert again.answer.uncond is not None
        assert torch.equal(again.answer.value, tensor)
        assert torch.equal(again.answer.uncond, tensor)
    assert len(kept) == 3
    with pytest.raises(InputError, match="was lent"):
        decode_array(encode_array(large, lend))
