import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from jitexport.kernels import native
from jitexport.kernels.attention import Stream, attention, blockwise_attention, rotate
from tests.kernels.conftest import relative

#: Relative error against fp32 on normal numbers: of sums in fp32, of bf16's rounding of weights and results, of 8 bits.
ERROR = {(torch.float32, False): 3e-6, (torch.bfloat16, False): 0.006}
ERROR |= {(dtype, True): 0.04 for dtype in (torch.float32, torch.bfloat16)}
KINDS = pytest.mark.parametrize(("dtype", "int8"), list(ERROR), ids=["fp32", "bf16", "fp32-int8", "bf16-int8"])

#: What masks add to the scores of keys that do not count.
HIDDEN = -1e30


def exact(q, k, v):
    """In fp32; heads [B, L, H, Dh]."""
    heads = [x.float().transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


def padding(*hidden, tokens):
    """A mask for images that hide the keys of these slices each."""
    mask = torch.zeros(len(hidden), tokens)
    for row, keys in zip(mask, hidden, strict=True):
        row[keys] = HIDDEN
    return mask


# --- by operators ---


def test_blockwise_attention_is_attention():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 255, 256, 600):
        q, k, v = torch.randn(3, 2, 3, length, 16, generator=generator)
        torch.testing.assert_close(blockwise_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@KINDS
def test_without_a_compiler_attention_is_pytorchs(normal, dtype, int8):
    q, k, v = (normal(2, 50, 3, 64, seed=i).to(dtype) for i in range(3))
    out = attention([Stream(q, k, v)], int8=int8)
    assert out.shape == q.shape and out.dtype == dtype
    assert relative(out, exact(q, k, v)) < 0.006


def two_streams(normal, channels, *, batch=2, lengths=(7, 60), heads=2):
    """Text and image with norms of their own, and angles of rotation for all tokens of each image."""
    streams = []
    for i, length in enumerate(lengths):
        q, k, v = (normal(batch, length, heads, channels, seed=10 * i + j) for j in range(3))
        streams.append(Stream(3 * q, k + 1, v, *(1 + normal(channels, seed=10 * i + j) / 4 for j in (3, 4))))
    angles = normal(batch, sum(lengths), channels // 2, seed=30).float()
    return streams, angles.cos(), angles.sin()


def written_out(streams, cos, sin, mask=None):
    """Norms, rotation as complex numbers, and attention, in fp64, as the equations read."""

    def normalised(x, weight):
        x = x.double()
        return x if weight is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    def turned(x):
        turn = torch.complex(cos.double(), sin.double())[:, :, None]
        first, rest = x.tensor_split([cos.shape[1]], dim=1)
        first = torch.view_as_real(torch.view_as_complex(first.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        return torch.cat([first, rest], dim=1)

    q = turned(torch.cat([normalised(s.q, s.q_norm) for s in streams], dim=1))
    k = turned(torch.cat([normalised(s.k, s.k_norm) for s in streams], dim=1))
    v = torch.cat([s.v.double() for s in streams], dim=1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.double()[:, None, None]
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_streams_norms_and_rotation(normal, dtype, error):
    streams, cos, sin = two_streams(normal, 16)
    out = attention([Stream(*(x.to(dtype) for x in s)) for s in streams], cos, sin)
    assert out.dtype == dtype and out.shape == (2, 67, 2, 16)
    assert relative(out, written_out(streams, cos, sin)) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("covered", [1, 30, 60, 66, 67])
def test_only_the_first_tokens_are_rotated(normal, dtype, error, covered):
    streams, cos, sin = two_streams(normal, 16, lengths=(60, 7))
    cos, sin = cos[:, :covered], sin[:, :covered]
    out = attention([Stream(*(x.to(dtype) for x in s)) for s in streams], cos, sin)
    assert relative(out, written_out(streams, cos, sin)) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_masked_keys_do_not_count(normal, dtype, error):
    streams, cos, sin = two_streams(normal, 16, lengths=(60, 7))
    mask = padding(slice(3, 4), slice(61, None), tokens=67)
    streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
    out = attention(streams, cos, sin, mask=mask)
    assert out.dtype == dtype and relative(out, written_out(streams, cos, sin, mask)) < error
    lone = [Stream(*(x[1:, :n] for x in s[:3]), *s[3:]) for s, n in zip(streams, (60, 1), strict=True)]
    assert relative(out[1:, :61], attention(lone, cos[1:, :61], sin[1:, :61]).double()) < error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_a_mask_of_any_finite_number_serves_all_images(normal, dtype, error, lowest):
    streams, cos, sin = two_streams(normal, 16)
    mask = padding(slice(0, 5), tokens=67).clamp(min=lowest)
    out = attention([Stream(*(x.to(dtype) for x in s)) for s in streams], cos[:1], sin[:1], mask=mask)
    assert relative(out, written_out(streams, cos[:1], sin[:1], mask)) < error


def test_a_mask_adds_to_scores(normal):
    """A bias that hides nothing, over several blocks of queries, in both of PyTorch's ways."""
    q, k, v = (normal(2, 600, 2, 16, seed=i).float() for i in range(3))
    mask = normal(2, 600, seed=3).float()
    wanted = written_out([Stream(q, k, v)], torch.ones(2, 600, 8), torch.zeros(2, 600, 8), mask)
    assert relative(attention([Stream(q, k, v)], mask=mask), wanted) < 1e-5
    parts = blockwise_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask).transpose(1, 2)
    assert relative(parts, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_may_differ_in_norms(normal, dtype):
    (text, image), cos, sin = two_streams(normal, 16)
    streams = [text._replace(q_norm=None), image._replace(k_norm=None)]
    out = attention([Stream(*(None if x is None else x.to(dtype) for x in s)) for s in streams], cos, sin)
    assert relative(out, written_out(streams, cos, sin)) < 0.01


def test_rotation_keeps_scores_of_positions_apart():
    """q at i and k at j score by i - j alone."""
    angles = torch.arange(8.0)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    cos, sin = angles.cos(), angles.sin()
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(t.expand(1, 8, 1, 8), cos, sin)[0, :, 0] for t in (q, k))
    scores = q @ k.T
    for offset in range(-7, 8):
        along = scores.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)


# --- by the operator ---


def heads_of(streams):
    """The operator's lists of queries, keys, values and norms."""
    return tuple([*parts] for parts in zip(*streams, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("covered", [0, 40, 67])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_is_attention(normal, dtype, covered, masked):
    streams, cos, sin = two_streams(normal, 64)
    streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
    mask = padding(slice(1, 9), slice(50, None), tokens=67) if masked else None
    cos, sin = cos[:, :covered], sin[:, :covered]
    given = *heads_of(streams), *((cos, sin) if covered else (None, None)), mask, 1e-6, False
    out = torch.ops.jitexport.attention(*given)
    assert relative(out, written_out(streams, cos, sin, mask)) < 0.01
    torch.library.opcheck(torch.ops.jitexport.attention, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_the_operator_what_it_takes(normal, monkeypatch, dtype):
    """Angles and a mask for all images become each image's own; what does not fit goes by PyTorch's operators."""
    streams, cos, sin = two_streams(normal, 64)
    streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
    mask = padding(slice(50, None), tokens=67)
    by_operators = attention(streams, cos[:1, :60], sin[:1, :60], mask=mask)
    taken = []
    operator = torch.ops.jitexport.attention
    monkeypatch.setattr(native, "wanted", lambda *_: True)
    monkeypatch.setattr(torch.ops.jitexport, "attention", lambda *given: taken.append(given) or operator(*given))
    assert torch.equal(attention(streams, cos[:1, :60], sin[:1, :60], mask=mask), by_operators)
    (*_, its_cos, its_sin, its_mask, _, _), = taken
    assert its_cos.shape == its_sin.shape == (2, 60, 32) and its_mask.shape == (2, 67)
    q, k, v = (x[:, :40] for x in streams[1][:3])
    assert attention([Stream(q, k[:, :9], v[:, :9])]).shape == q.shape  # fewer keys than queries
    with pytest.raises(RuntimeError):
        attention([Stream(q, k, v)], cos, sin)  # more angles than tokens
    with pytest.raises(RuntimeError):
        attention([Stream(q, k, v)], mask=mask)
    assert len(taken) == 1


# --- by the kernel ---


@KINDS
@pytest.mark.parametrize("channels", [64, 128])
def test_the_kernel_normalises_and_rotates(kernels, normal, dtype, int8, channels):
    for lengths in [(7, 60), (64, 1), (1, 1200)]:
        streams, cos, sin = two_streams(normal, channels, lengths=lengths)
        streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
        q, k, v = (torch.cat(parts, dim=1) for parts in list(zip(*streams, strict=True))[:3])
        norms = [(s.q_norm, s.k_norm) for s in streams]
        out = kernels.attention(q, k, v, int8=int8, split=lengths[0], norms=norms, cos=cos, sin=sin)
        assert relative(out, written_out(streams, cos, sin)) < 1.5 * ERROR[dtype, int8]
        out = kernels.attention(q, k, v, int8=int8, split=lengths[0], norms=norms)
        unturned = written_out(streams, torch.ones_like(cos), torch.zeros_like(sin))
        assert relative(out, unturned) < 1.5 * ERROR[dtype, int8]
    out = kernels.attention(q, k, v, int8=int8, cos=cos, sin=sin)
    plain = attention([Stream(q.float(), k.float(), v.float())], cos, sin)
    assert relative(out, plain) < 1.5 * ERROR[dtype, int8]


def by_kernel(kernels, streams, int8, **options):
    """Two streams' attention."""
    q, k, v = (torch.cat(parts, dim=1) for parts in list(zip(*streams, strict=True))[:3])
    norms = [(s.q_norm, s.k_norm) for s in streams]
    return kernels.attention(q, k, v, int8=int8, split=streams[0].q.shape[1], norms=norms, **options)


@KINDS
@pytest.mark.parametrize("covered", [1, 59, 60, 63])
def test_the_kernel_rotates_the_first_tokens(kernels, normal, dtype, int8, covered):
    streams, cos, sin = two_streams(normal, 64, lengths=(60, 7))
    streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
    cos, sin = cos[:, :covered].contiguous(), sin[:, :covered].contiguous()
    out = by_kernel(kernels, streams, int8, cos=cos, sin=sin)
    assert relative(out, written_out(streams, cos, sin)) < 1.5 * ERROR[dtype, int8]


@KINDS
@pytest.mark.parametrize(
    ("tokens", "keys", "hidden"),
    [
        (67, (slice(3, 4), slice(60, None)), HIDDEN),  # one key; the last ones, of another length in the other image
        (67, (slice(0, 66), slice(0, 0)), HIDDEN),  # all but one; none
        (300, (slice(5, None), slice(64, 128)), -1e4),  # whole tiles
        (1200, (slice(0, 700), slice(500, None)), -1e4),  # the whole first of two chunks; the whole last
        (1200, (slice(0, 700), slice(500, None)), HIDDEN),
        (1200, (slice(0, 700), slice(500, None)), torch.finfo(torch.float32).min),
        (2500, (slice(0, 2499), slice(1, 2499)), HIDDEN),  # of three chunks, all but the last key; and but the first
    ],
)
def test_the_kernel_hides_masked_keys(kernels, normal, dtype, int8, tokens, keys, hidden):
    """As attention in fp64 does; and whatever hidden keys and values are, the rest comes out the same."""
    streams, cos, sin = two_streams(normal, 64, lengths=(50, tokens - 50), heads=1)
    streams = [Stream(*(x.to(dtype) for x in s)) for s in streams]
    mask = padding(*keys, tokens=tokens).clamp(min=hidden)
    out = by_kernel(kernels, streams, int8, cos=cos, sin=sin, mask=mask)
    assert relative(out, written_out(streams, cos, sin, mask)) < 1.5 * ERROR[dtype, int8]
    others = [s._replace(k=s.k.clone(), v=s.v.clone()) for s in streams]
    for stream, part in zip(others, (mask != 0).split((50, tokens - 50), dim=1), strict=True):
        stream.k[part], stream.v[part] = -stream.k[part], -stream.v[part]
    changed = by_kernel(kernels, others, int8, cos=cos, sin=sin, mask=mask)
    # Whole numbers depend on the mean of all keys and the largest values. Others differ where sums lie between two
    # numbers, and a weight of 2^-126 decides.
    assert relative(changed, out.float()) < (1.5 * ERROR[dtype, True] if int8 else 1e-6)


@KINDS
@pytest.mark.parametrize("tokens", [70, 1300])
def test_the_kernel_adds_a_mask_to_scores(kernels, normal, dtype, int8, tokens):
    q, k, v = (normal(2, tokens, 2, 64, seed=i).to(dtype) for i in range(3))
    mask = 2 * normal(2, tokens, seed=3).float()
    out = kernels.attention(q, k, v, int8=int8, mask=mask)
    unturned = torch.ones(2, tokens, 32), torch.zeros(2, tokens, 32)
    assert relative(out, written_out([Stream(q, k, v)], *unturned, mask)) < ERROR[dtype, int8]


@KINDS
def test_a_mask_of_zeros_changes_nothing(kernels, normal, dtype, int8):
    q, k, v = (normal(1, 1200, 1, 64, seed=i).to(dtype) for i in range(3))
    plain, masked = (kernels.attention(q, k, v, int8=int8, mask=mask) for mask in (None, torch.zeros(1, 1200)))
    assert relative(masked, plain.float()) < (ERROR[dtype, int8] if int8 else ERROR[dtype, False] / 3)


@KINDS
def test_where_all_keys_are_hidden_attention_is_finite(kernels, normal, dtype, int8):
    """And does not touch the other image."""
    q, k, v = (normal(2, 1300, 1, 64, seed=i).to(dtype) for i in range(3))
    out = kernels.attention(q, k, v, int8=int8, mask=padding(slice(None), slice(9, None), tokens=1300))
    assert out.isfinite().all()
    alone = kernels.attention(*(x[1:] for x in (q, k, v)), int8=int8, mask=padding(slice(9, None), tokens=1300))
    assert torch.equal(out[1:], alone)


@given(
    batch=st.integers(1, 2), length=st.integers(1, 200), heads=st.integers(1, 3), channels=st.sampled_from([64, 128]),
    kind=st.sampled_from(list(ERROR)), seed=st.integers(0, 10),
)
@example(batch=1, length=64, heads=1, channels=64, kind=(torch.bfloat16, True), seed=0)  # whole tiles
@example(batch=1, length=1153, heads=1, channels=64, kind=(torch.bfloat16, True), seed=0)  # a chunk and one key
@example(batch=1, length=2500, heads=2, channels=64, kind=(torch.bfloat16, False), seed=0)  # three chunks
@example(batch=1, length=2500, heads=1, channels=64, kind=(torch.float32, False), seed=0)
@example(batch=2, length=2500, heads=1, channels=128, kind=(torch.bfloat16, True), seed=0)
def test_the_kernel_is_attention(kernels, normal, batch, length, heads, channels, kind, seed):
    dtype, int8 = kind
    q, k, v = (normal(batch, length, heads, channels, seed=3 * seed + i).to(dtype) for i in range(3))
    out = kernels.attention(q, k, v, int8=int8)
    assert relative(out, exact(q, k, v)) < ERROR[dtype, int8]


@KINDS
def test_weights_sum_to_one(kernels, normal, dtype, int8):
    q, k = normal(1, 333, 2, 64).to(dtype), normal(1, 333, 2, 64, seed=1).to(dtype)
    torch.testing.assert_close(
        kernels.attention(q, 3 * k, torch.ones_like(q), int8=int8), torch.ones_like(q), rtol=0.004, atol=0
    )


@KINDS
def test_many_small_weights_keep_their_sum(kernels, dtype, int8):
    """One key has weight 1 and a thousand have 1/1000 each, less than half of what 8 bits resolve: a half in all."""
    tokens = 1001
    q, k, v = torch.zeros(3, 1, tokens, 1, 64)
    q[..., 0] = 8.0  # 64 ** 0.5
    k[0, 1:, 0, 0] = -torch.tensor(1000.0).log()
    k[0, :, 0, 1] = torch.linspace(-1, 1, tokens)  # keys are not all the same; queries do not see this channel
    v[0, 1:] = 1.0
    out = kernels.attention(q.to(dtype), k.to(dtype), v.to(dtype), int8=int8)
    wanted = exact(q.to(dtype), k.to(dtype), v.to(dtype))
    assert wanted.min() > 0.49 and wanted.max() < 0.51
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=0.01)


@KINDS
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_what_all_keys_have_in_common_does_not_matter(kernels, normal, dtype, int8, shift):
    """Nor does padding, whose score would be 0, count where all scores are far below."""
    q, k, v = (normal(1, 70, 1, 64, seed=i).to(dtype) for i in range(3))
    q[..., 0], k[..., 0] = 8.0, 0.0
    before = kernels.attention(q, k, v, int8=int8).float()
    k[..., 0] = shift
    after = kernels.attention(q, k, v, int8=int8)
    assert relative(after, before) < max(ERROR[dtype, int8], 3e-4)  # fp32 resolves scores of 300 to 3e-5


@KINDS
def test_a_sharp_maximum_gives_its_value(kernels, normal, dtype, int8):
    k, v = normal(1, 1500, 1, 64).to(dtype), normal(1, 1500, 1, 64, seed=1).to(dtype)
    assert relative(kernels.attention(20 * k, 20 * k, v, int8=int8), v.float()) < 0.01


@KINDS
def test_the_order_of_keys_does_not_matter(kernels, normal, dtype, int8):
    q, k, v = (normal(1, 200, 2, 64, seed=i).to(dtype) for i in range(3))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    changed = kernels.attention(q, k[:, order].contiguous(), v[:, order].contiguous(), int8=int8)
    assert relative(changed, kernels.attention(q, k, v, int8=int8).float()) < ERROR[dtype, int8]


@KINDS
def test_heads_and_images_do_not_see_each_other(kernels, normal, dtype, int8):
    q, k, v = (normal(2, 100, 3, 64, seed=i).to(dtype) for i in range(3))
    together = kernels.attention(q, k, v, int8=int8)
    for b in range(2):
        for h in range(3):
            alone = kernels.attention(*(x[b : b + 1, :, h : h + 1].contiguous() for x in (q, k, v)), int8=int8)
            assert torch.equal(alone[0, :, 0], together[b, :, h])


@KINDS
def test_the_number_of_threads_does_not_matter(kernels, normal, dtype, int8):
    q, k, v = (normal(1, 300, 2, 64, seed=i).to(dtype) for i in range(3))
    one, three = (kernels.attention(q, k, v, int8=int8, threads=n) for n in (1, 3))
    assert torch.equal(one, three)


@KINDS
def test_zeros_give_the_mean(kernels, normal, dtype, int8):
    zeros, v = torch.zeros(1, 90, 1, 64, dtype=dtype), normal(1, 90, 1, 64).to(dtype)
    out = kernels.attention(zeros, zeros, v, int8=int8)
    assert relative(out, v.float().mean(dim=1, keepdim=True).expand(v.shape)) < ERROR[dtype, int8]
    assert not kernels.attention(zeros, zeros, zeros, int8=int8).any()
