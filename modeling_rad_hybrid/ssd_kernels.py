"""
Triton kernels of the recurrent heads: the scan by chunks, forward and backward, and one token of decoding.

Equations: those of [`ssd`] in `ssd.py`; only `ssd_triton.py` launches these. Within a chunk, with c_i the sum of log a
up to token i, h the state before the chunk and G the gradient of the state after it:

    y_i  = sum_{j <= i} (C_i . B_j) e^(c_i - c_j) x_j + e^(c_i) h C_i
    dx_j = sum_{i >= j} (C_i . B_j) e^(c_i - c_j) dy_i + e^(c_Q - c_j) G B_j

No Q x Q matrix ever reaches memory; all that is kept between the kernels is one float32 state a chunk. Decays are held
as log2, sums and states in float32. Nothing here transposes the result of one product to feed another: Triton has been
seen to compile that wrongly on Hopper.

Shape letters: B batch, T tokens, H heads, P head dim, N state, Q tokens of a chunk, K convolution width. A kernel's
grid is (heads, chunks, batch), heads first so that neighbours share the sectors of B, C and log a in the L2 cache.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no GPU build of torch: ssd.py stays with PyTorch
    triton = None


def jit(function):
    return function if triton is None else triton.jit(function)


@jit
def segmented_add(left, left_fresh, right, right_fresh):
    """Addition that forgets what is left of a document's start; for `tl.associative_scan`."""
    return right + tl.where(right_fresh != 0, 0.0, left), left_fresh | right_fresh


@jit
def compose(left_decay, left, right_decay, right):
    """One recurrence h -> decay h + value after another; for `tl.associative_scan`."""
    return left_decay * right_decay, right_decay * left + right


@jit
def chunk_decays(log_a, step, idx, row, start, tokens, Q: constexpr, HAS_IDX: constexpr):
    """
    Decays of one chunk. `log_a` points to its first token; `idx`, where there is one, has the row's tokens from
    `row` on.

    Returns log2 of the decay from the chunk's start to each token `[Q]`, that of the whole chunk, each token's document
    `[Q]`, 1 where a token's document came from the chunk before `[Q]`, 1 where it reaches the end `[Q]`, 1 where the
    state passes through.
    """
    place = tl.arange(0, Q)
    values = tl.load(log_a + place * step, mask=start + place < tokens, other=0.0) * 1.4426950408889634
    if HAS_IDX:
        idx += row
        # Beyond the row its last document goes on.
        here = tl.minimum(start + place, tokens - 1)
        document = tl.load(idx + here)
        fresh = (
            document != tl.load(idx + tl.maximum(start + place - 1, 0), mask=start + place <= tokens, other=0)
        ) & ((place > 0) & (start + place < tokens))
        to_token, _ = tl.associative_scan((values, fresh.to(tl.int32)), 0, segmented_add)
        first = tl.load(idx + tl.maximum(start - 1, 0))
        final = tl.load(idx + tl.minimum(start + Q - 1, tokens - 1))
        carried = (document == first).to(tl.float32)
        kept = (document == final).to(tl.float32)
        through = (first == final).to(tl.float32)
    else:
        document = tl.zeros([Q], tl.int32)
        to_token = tl.cumsum(values, 0)
        carried = tl.full([Q], 1.0, tl.float32)
        kept = carried
        through = 1.0
    total = tl.sum(tl.where(place == Q - 1, to_token, 0.0), 0)
    return to_token, total, document, carried, kept, through


@jit
def load_tile(pointer, step, width, rows_left, Q: constexpr, W: constexpr):
    """`[Q, W]` from rows `step` apart; zeros beyond `rows_left` rows and `width` columns."""
    place, column = tl.arange(0, Q), tl.arange(0, W)
    mask = (place[:, None] < rows_left) & (column[None, :] < width)
    return tl.load(pointer + place[:, None] * step + column[None, :], mask=mask, other=0.0)


@jit
def store_tile(pointer, step, width, rows_left, tile, Q: constexpr, W: constexpr):
    place, column = tl.arange(0, Q), tl.arange(0, W)
    mask = (place[:, None] < rows_left) & (column[None, :] < width)
    tl.store(pointer + place[:, None] * step + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@jit
def chunk_state_kernel(
    x, b, log_a, idx, states, decays, tokens, chunks, x_batch, x_token, x_head, b_batch, b_token, b_head, a_batch,
    a_token, N, P, Q: constexpr, BN: constexpr, BP: constexpr, HAS_IDX: constexpr, BACKWARD: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """
    What a chunk alone leaves in the state: sum_j e^(c_Q - c_j) x_j B_j^T, into slot chunk + 1 of `states`
    `[B, C + 1, H, P, N]`, and its decay into `decays` `[B, H, C]`. With BACKWARD, given dy and C, what it leaves in the
    gradient of the state before it: sum_i e^(c_i) dy_i C_i^T, into slot chunk.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    start = chunk * Q
    at = start.to(tl.int64)
    to_token, total, _, carried, kept, through = chunk_decays(
        log_a + batch * a_batch + at * a_token + head, a_token, idx, batch * tokens, start, tokens, Q, HAS_IDX
    )
    inputs = load_tile(x + batch * x_batch + at * x_token + head * x_head, x_token, P, tokens - start, Q, BP)
    vectors = load_tile(b + batch * b_batch + at * b_token + head * b_head, b_token, N, tokens - start, Q, BN)
    if BACKWARD:
        weights = tl.exp2(to_token) * carried
        slot = chunk
    else:
        # Never above 0 within a document; from another one it could overflow, and infinity times 0 is no 0.
        weights = tl.exp2(tl.minimum(total - to_token, 0.0)) * kept
        slot = chunk + 1
        tl.store(decays + (batch * heads + head) * chunks + chunk, tl.exp2(total) * through)
    weighted = (vectors * weights[:, None]).to(inputs.dtype)
    local = tl.dot(tl.trans(inputs), weighted, input_precision=PRECISION)  # [P, N]
    target = states + ((batch * (chunks + 1) + slot) * heads + head) * P * N
    store_tile(target, N, N, P, local, BP, BN)


@jit
def state_passing_kernel(
    states, decays, edge, result, chunks, size, GROUP: constexpr, BLOCK: constexpr, HAS_EDGE: constexpr,
    BACKWARD: constexpr,
):  # fmt: skip
    """
    The recurrence over chunks, in place in `states` `[B, C + 1, H, P N]`: slot c becomes the state before chunk c and
    slot C the last state, from `edge` `[B, H, P N]` at slot 0. With BACKWARD from the end: slot c becomes the gradient
    of the state before chunk c, from `edge` at slot C. The far end goes to `result` `[B, H, P N]` too.

    GROUP chunks at a time, whose loads do not wait for one another.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    row = tl.arange(0, GROUP)
    edges = (batch * heads + head) * size + column
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_EDGE:
        carry = tl.load(edge + edges, mask=inside, other=0.0).to(tl.float32)
    states += (batch * (chunks + 1) * heads + head) * size
    decays += (batch * heads + head) * chunks
    near = chunks if BACKWARD else 0
    step = heads.to(tl.int64) * size
    tl.store(states + near * step + column, carry, mask=inside)
    first = 0
    while first < chunks:
        done = first + row
        chunk = chunks - 1 - done if BACKWARD else done
        slot = chunk if BACKWARD else chunk + 1
        places = states + slot[:, None] * step + column[None, :]
        mask = (done[:, None] < chunks) & inside[None, :]
        local = tl.load(places, mask=mask, other=0.0)
        decay = tl.load(decays + chunk, mask=done < chunks, other=1.0)
        decay, local = tl.associative_scan((tl.broadcast_to(decay[:, None], [GROUP, BLOCK]), local), 0, compose)
        local += decay * carry[None, :]
        tl.store(places, local, mask=mask)
        carry = tl.sum(tl.where(row[:, None] == GROUP - 1, local, 0.0), 0)
        first += GROUP
    tl.store(result + edges, carry, mask=inside)


@jit
def chunk_scan_kernel(
    x, b, c, log_a, idx, states, y, tokens, chunks, x_batch, x_token, x_head, b_batch, b_token, b_head, c_batch,
    c_token, c_head, a_batch, a_token, N, P, Q: constexpr, BN: constexpr, BP: constexpr, HAS_IDX: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """Outputs of one chunk of one head, from the state before it; `y` is `[B, T, H, P]`, contiguous."""
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    start = chunk * Q
    at = start.to(tl.int64)
    left = tokens - start
    to_token, _, document, carried, _, _ = chunk_decays(
        log_a + batch * a_batch + at * a_token + head, a_token, idx, batch * tokens, start, tokens, Q, HAS_IDX
    )
    inputs = load_tile(x + batch * x_batch + at * x_token + head * x_head, x_token, P, left, Q, BP)
    ins = load_tile(b + batch * b_batch + at * b_token + head * b_head, b_token, N, left, Q, BN)
    outs = load_tile(c + batch * c_batch + at * c_token + head * c_head, c_token, N, left, Q, BN)
    state = load_tile(states + ((batch * (chunks + 1) + chunk) * heads + head) * P * N, N, N, P, BP, BN)
    place = tl.arange(0, Q)
    mask = place[:, None] >= place[None, :]
    if HAS_IDX:
        mask = mask & (document[:, None] == document[None, :])
    scores = tl.dot(outs, tl.trans(ins), input_precision=PRECISION)
    scores = tl.where(mask, scores * tl.exp2(to_token[:, None] - to_token[None, :]), 0.0)
    result = tl.dot(scores.to(inputs.dtype), inputs, input_precision=PRECISION)  # [Q, P]
    from_start = outs.to(tl.float32) * (tl.exp2(to_token) * carried)[:, None]
    result += tl.dot(from_start, tl.trans(state), input_precision=PRECISION)
    target = y + ((batch * tokens + at) * heads + head) * P
    store_tile(target, heads * P, P, left, result, Q, BP)


@jit
def chunk_gradient_kernel(
    x, b, c, log_a, idx, dy, states, dstates, decays, dx, db, dc, da, tokens, chunks, x_batch, x_token, x_head,
    b_batch, b_token, b_head, c_batch, c_token, c_head, a_batch, a_token, y_batch, y_token, y_head, N, P,
    Q: constexpr, BN: constexpr, BP: constexpr, HAS_IDX: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """
    Gradients of one chunk of one head, from the state before it and the gradient of the state after it; `dx`
    `[B, T, H, P]`, `db` and `dc` `[B, T, H, N]` and `da` `[B, T, H]` are contiguous.

    The gradient of log a_k adds up what passes from tokens j < k to tokens i >= k, term by term: differences of row and
    column sums would cancel.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    start = chunk * Q
    at = start.to(tl.int64)
    left = tokens - start
    to_token, total, document, carried, kept, _ = chunk_decays(
        log_a + batch * a_batch + at * a_token + head, a_token, idx, batch * tokens, start, tokens, Q, HAS_IDX
    )
    inputs = load_tile(x + batch * x_batch + at * x_token + head * x_head, x_token, P, left, Q, BP)
    ins = load_tile(b + batch * b_batch + at * b_token + head * b_head, b_token, N, left, Q, BN)
    outs = load_tile(c + batch * c_batch + at * c_token + head * c_head, c_token, N, left, Q, BN)
    grads = load_tile(dy + batch * y_batch + at * y_token + head * y_head, y_token, P, left, Q, BP)
    slot = ((batch * (chunks + 1) + chunk) * heads + head) * P * N
    state = load_tile(states + slot, N, N, P, BP, BN)
    dstate = load_tile(dstates + slot + heads * P * N, N, N, P, BP, BN)
    row = (batch * tokens + at) * heads + head
    place = tl.arange(0, Q)

    # Rows are outputs i, columns inputs j: what dC and the decays need.
    mask = place[:, None] >= place[None, :]
    if HAS_IDX:
        mask = mask & (document[:, None] == document[None, :])
    decay = tl.where(mask, tl.exp2(to_token[:, None] - to_token[None, :]), 0.0)
    dscores = tl.dot(grads, tl.trans(inputs), input_precision=PRECISION) * decay
    from_start = (tl.exp2(to_token) * carried)[:, None]
    dout = tl.dot(grads.to(tl.float32), state, input_precision=PRECISION) * from_start  # [Q, N]
    da_from_state = tl.sum(dout * outs, 1)
    dout += tl.dot(dscores.to(inputs.dtype), ins, input_precision=PRECISION)
    store_tile(dc + row * N, heads * N, N, left, dout, Q, BN)
    passed = dscores * tl.dot(outs, tl.trans(ins), input_precision=PRECISION)
    passed = tl.where(place[:, None] > place[None, :], passed, 0.0)
    before = tl.cumsum(passed, 1) - passed
    dlog_a = tl.sum(tl.where(place[:, None] >= place[None, :], before, 0.0), 0)  # [Q]
    dlog_a += tl.cumsum(da_from_state, 0, reverse=True)

    # The other way round: what dB and dx need.
    mask = place[None, :] >= place[:, None]
    if HAS_IDX:
        mask = mask & (document[:, None] == document[None, :])
    decay = tl.where(mask, tl.exp2(to_token[None, :] - to_token[:, None]), 0.0)
    dscores = tl.dot(inputs, tl.trans(grads), input_precision=PRECISION) * decay
    to_end = (tl.exp2(tl.minimum(total - to_token, 0.0)) * kept)[:, None]
    din = tl.dot(inputs.to(tl.float32), dstate, input_precision=PRECISION) * to_end  # [Q, N]
    da_to_state = tl.sum(din * ins, 1)
    din += tl.dot(dscores.to(inputs.dtype), outs, input_precision=PRECISION)
    store_tile(db + row * N, heads * N, N, left, din, Q, BN)
    scores = tl.dot(ins, tl.trans(outs), input_precision=PRECISION) * decay
    dinput = tl.dot(scores.to(inputs.dtype), grads, input_precision=PRECISION)  # [Q, P]
    dinput += tl.dot(ins.to(tl.float32) * to_end, tl.trans(dstate), input_precision=PRECISION)
    store_tile(dx + row * P, heads * P, P, left, dinput, Q, BP)

    dlog_a += tl.cumsum(da_to_state, 0) - da_to_state
    dlog_a += tl.load(decays + (batch * heads + head) * chunks + chunk) * tl.sum(tl.sum(state * dstate, 1), 0)
    tl.store(da + row + place * heads, dlog_a, mask=place < left)


@jit
def convolve_step(window, weight, new, channel, inside, K: constexpr, BK: constexpr, BLOCK: constexpr):
    """One token of the causal convolution for some channels; the window of the last K tokens moves on in place."""
    tap = tl.arange(0, BK)
    places = channel[:, None] * K + tap[None, :]
    mask = inside[:, None] & (tap[None, :] < K)
    columns = tl.load(window + places + 1, mask=mask & (tap[None, :] < K - 1), other=0.0)
    columns = tl.where(tap[None, :] == K - 1, new[:, None], columns)
    weights = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
    # A column is read by one thread and written by another.
    tl.debug_barrier()
    tl.store(window + places, columns, mask=mask)
    return tl.sum(columns.to(tl.float32) * weights, 1)


@jit
def decode_step_kernel(
    projected, window, weight, state, skip, out, row, heads, channels, N, P, K: constexpr, BN: constexpr,
    BP: constexpr, BK: constexpr,
):  # fmt: skip
    """One token of one head of one sequence, from the input projection's row to what the output projection reads."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner = heads * P
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    in_p, in_n = p < P, n < N
    projected += batch * row
    window += batch * channels * K
    x_at, b_at, c_at = head * P + p, inner + head * N + n, inner + (heads + head) * N + n
    z = tl.load(projected + x_at, mask=in_p, other=0.0).to(tl.float32)
    x = tl.load(projected + inner + x_at, mask=in_p, other=0.0)
    b = tl.load(projected + inner + b_at, mask=in_n, other=0.0)
    c = tl.load(projected + inner + c_at, mask=in_n, other=0.0)
    A_log = tl.load(projected + inner + channels + head).to(tl.float32)
    places = state + (batch * heads + head) * P * N + p[:, None] * N + n[None, :]
    mask = in_p[:, None] & in_n[None, :]
    h = tl.load(places, mask=mask, other=0.0)
    x = convolve_step(window, weight, x, x_at, in_p, K, BK, BP)
    b = convolve_step(window, weight, b, b_at, in_n, K, BK, BN)
    c = convolve_step(window, weight, c, c_at, in_n, K, BK, BN)
    # a = exp(-softplus(A_log)).
    h = h / (1.0 + tl.exp(A_log)) + x[:, None] * b[None, :]
    tl.store(places, h, mask=mask)
    y = tl.sum(h * c[None, :], 1) + tl.load(skip + head).to(tl.float32) * x
    y = y * z / (1.0 + tl.exp(-z))
    tl.store(out + batch * inner + x_at, y.to(out.dtype.element_ty), mask=in_p)
