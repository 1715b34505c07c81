"""What users pass in is checked before anything is computed."""

import pytest
import torch
from helpers import tiny_model, tokens

MODEL = tiny_model()


@pytest.mark.parametrize("input_ids, message", [
    (tokens(4), r"input_ids is \(4,\)"), (tokens(1, 4).float(), "float32"),
    (torch.zeros(1, 0, dtype=torch.long), "non-empty"),
    ([[1, 2]], "list"), (torch.tensor([[1, 23]]), "holds 23; .*0 to 22"), (torch.tensor([[-1, 3]]), "holds -1"),
    (torch.tensor([[True, False]]), "bool"),
], ids=["one axis", "floats", "empty", "a list", "too large", "negative", "bools"])  # fmt: skip
def test_invalid_input_ids_are_refused(input_ids, message):
    with pytest.raises(ValueError, match=message):
        MODEL(input_ids, 1)


@pytest.mark.parametrize(
    "attention_mask", [torch.ones(2, 3), torch.ones(4), torch.ones(1, 4)], ids=lambda m: str(m.shape)
)
def test_a_mask_of_the_wrong_shape_is_refused(attention_mask):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*use \(2, 4\)"):
        MODEL(tokens(2, 4), 1, attention_mask=attention_mask)


@pytest.mark.parametrize(
    "value, dtype",
    [(float("-inf"), torch.float32), (float("nan"), torch.float32), (0.5, torch.float32), (-1, torch.int64)],
)
def test_masks_with_values_that_mark_no_padding_are_refused(value, dtype):
    mask = torch.ones(2, 4, dtype=dtype)
    mask[0, 0] = value
    with pytest.raises(ValueError, match=r"values other than 0 .padding., 1 .tokens. and document numbers"):
        MODEL(tokens(2, 4), 1, attention_mask=mask)


@pytest.mark.parametrize("n_loops", [0, -1, 1.5, 2.0, True, "3", [2], torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("call", ["forward", "generate", "stream", "iterate"])
def test_n_loops_must_be_a_positive_integer(n_loops, call):
    model = MODEL
    options = {"max_new_tokens": 2} if call in ("generate", "stream") else {}
    with pytest.raises(ValueError, match="n_loops="):
        list(getattr(model, call)(tokens(1, 3), n_loops=n_loops, **options))


def test_stream_checks_n_loops_before_iteration():
    with pytest.raises(ValueError, match="n_loops=0"):
        MODEL.stream(tokens(1, 3), max_new_tokens=2, n_loops=0)
