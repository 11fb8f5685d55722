"""decoding/ against transformers' generate and against full forward passes, in fp32."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from decoding.cached_model import how_many_fit
from decoding.generator import TextGenerator
from decoding.sampling import Sampling
from program.errors import InputError, RunError
from test_model import TINY, TOLERANCE, VARIANTS, make_pair
from tokens.tokenizer import Tokenizer

EOS = 2
LENGTHS = (1, 2, 7, 30, 64)


class Numbers:
    """A tokenizer whose text is the token ids themselves: "17 4 99 "."""

    eos_id = EOS

    def continuation(self, ids):
        return "".join(f"{i} " for i in ids)


def make_prompts(n, beginning=0, seed=0):
    """n prompts of various lengths that share their first `beginning` tokens; two are equal."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, TINY["vocab_size"]) for _ in range(beginning)]
    prompts = [
        shared + [rng.randrange(3, TINY["vocab_size"]) for _ in range(rng.choice(LENGTHS))]
        for _ in range(n)
    ]
    return [*prompts[:-1], prompts[0]]


def their_answer(theirs, prompt, most):
    """transformers' greedy tokens for one prompt, without EOS."""
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most,
                          do_sample=False, eos_token_id=EOS, pad_token_id=0)  # fmt: skip
    return [i for i in out[0, len(prompt) :].tolist() if i != EOS]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("beginning", [0, 41])
def test_greedy_is_transformers_generate(name, beginning):
    """Token for token, with more prompts than slots, whatever they have in common."""
    ours, theirs = make_pair(VARIANTS[name])
    prompts = make_prompts(11, beginning)
    answers = TextGenerator(ours, Numbers(), slots=4).generate(prompts, Sampling(23))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == their_answer(theirs, prompt, 23)
        assert answer.finish == ("length" if len(answer.ids) == 23 else "eos")
        assert answer.text == Numbers().continuation(answer.ids)


def test_some_answers_end_early():
    """The test above saw sequences leave the batch before others, by EOS."""
    ours, _ = make_pair(VARIANTS["2:1, like Code Llama"])
    answers = TextGenerator(ours, Numbers(), slots=4).generate(make_prompts(11), Sampling(23))
    assert {answer.finish for answer in answers} == {"length", "eos"}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_step_equals_the_full_forward(name):
    """Logits after every token of documents that grow one token at a time."""
    ours, _ = make_pair(VARIANTS[name])
    generator = TextGenerator(ours, Numbers(), slots=3)
    texts = [[rng.randrange(3, 101) for _ in range(12)] for rng in map(random.Random, range(3))]
    seen = []

    def follow(logits, sequences, sampling):  # in place of `choose`: the text goes on as given
        seen.append((logits, [(s.number, len(s.new)) for s in sequences]))
        return torch.tensor([texts[s.number][4 * s.number + 1 + len(s.new)] for s in sequences])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoding.generator.choose", follow)
        generator.generate([text[: 4 * k + 1] for k, text in enumerate(texts)], Sampling(3))
    for logits, places in seen:
        for row, (k, new) in zip(logits, places, strict=True):
            ids = torch.tensor(texts[k][: 4 * k + 1 + new])
            full = ours(ids, torch.zeros(len(ids), dtype=torch.int32), torch.tensor([-1]))[0]
            torch.testing.assert_close(row, full, **TOLERANCE)
    assert len(seen) == 3


@pytest.mark.parametrize("beginning", [0, 41])
def test_option_logps_are_transformers(beginning):
    """Summed log-probabilities of options of one to five tokens after each prompt."""
    ours, theirs = make_pair(VARIANTS["2:1, like Code Llama"])
    prompts, rng = make_prompts(7, beginning), random.Random(1)
    options = [
        [[rng.randrange(3, 101) for _ in range(rng.choice((1, 1, 2, 5)))] for _ in range(4)]
        for _ in prompts
    ]
    scores = TextGenerator(ours, Numbers(), slots=3).option_logps(prompts, options)
    for prompt, of_prompt, logps in zip(prompts, options, scores, strict=True):
        for option, logp in zip(of_prompt, logps, strict=True):
            with torch.no_grad():
                all_logps = theirs(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(option) - 1)
            expected = sum(all_logps[i, t].item() for i, t in zip(places, option, strict=True))
            assert logp == pytest.approx(expected, abs=5e-5)  # five times 1e-5, see test_model


def test_prompts_share_a_row_and_a_longer_one_has_its_own(monkeypatch):
    """A row takes prompts up to its size; the answers are the same as from one large row."""
    ours, _ = make_pair({})
    prompts, generator = make_prompts(8), TextGenerator(ours, Numbers(), slots=4)
    options = [[[4, 5], [6]]] * 8
    expected = generator.generate(prompts, Sampling(5))
    scores = generator.option_logps(prompts, options)
    monkeypatch.setattr("decoding.cached_model.ROW_TOKENS", 9)
    assert max(map(len, prompts)) > 9
    for lengths, n in (([10, 1], 1), ([4, 5, 1], 2), ([9, 1], 1), ([1] * 5, 4), ([2], 1)):
        assert how_many_fit(lengths, slots=4) == n
    assert generator.generate(prompts, Sampling(5)) == expected
    for of_prompt, logps in zip(scores, generator.option_logps(prompts, options), strict=True):
        assert logps == pytest.approx(of_prompt, abs=2e-5)  # two times 1e-5, see test_model


def test_options_share_rows_of_the_same_size(monkeypatch):
    """With hundreds of slots their options could make a row that no memory was kept for."""
    ours, _ = make_pair({})
    prompts, generator = [[3, 4], [5, 6], [7]], TextGenerator(ours, Numbers(), slots=64)
    options = [[[4] * n for n in (5, 2, 7)], [[5] * 12], [[8] * 3, [9]]]
    expected = generator.option_logps(prompts, options)
    monkeypatch.setattr("decoding.cached_model.ROW_TOKENS", 9)
    rows, nll = [], generator.cached.nll
    monkeypatch.setattr(generator.cached, "nll", lambda *a: rows.append(a[2]) or nll(*a))
    for of_prompt, logps in zip(expected, generator.option_logps(prompts, options), strict=True):
        assert logps == pytest.approx(of_prompt, abs=1.2e-4)  # twelve times 1e-5, see test_model
    lengths = [[len(option) for option in row] for row in rows]
    assert sorted(sum(lengths, [])) == [2, 3, 5, 7, 12]
    assert all(sum(row) <= 9 or len(row) == 1 for row in lengths) and len(rows) < 5


def test_no_option_and_an_empty_one():
    """A prompt without options has no result; an empty option has log-probability 0."""
    ours, _ = make_pair({})
    prompts, options = [[3, 4], [5], [6]], [[[], [7]], [], [[7]]]
    scores = TextGenerator(ours, Numbers()).option_logps(prompts, options)
    assert [len(logps) for logps in scores] == [2, 0, 1]
    assert scores[0][0] == 0 > scores[0][1] and scores[2][0] < 0
    assert TextGenerator(ours, Numbers()).option_logps([], []) == []


def test_no_memory_for_the_cache(monkeypatch):
    """The error says what was asked for, and which flag makes it less."""
    ours, _ = make_pair({})
    generator = TextGenerator(ours, Numbers(), slots=2)

    def full(*shape, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("decoding.kv_cache.torch.zeros", full)
    with pytest.raises(RunError, match="3 times 256 tokens: try fewer --slots"):
        generator.generate([[3]], Sampling(5))


def test_samples_do_not_depend_on_other_prompts():
    """The same for any number of slots and any other prompts; another seed, other samples."""
    ours, _ = make_pair({})
    prompts, sampling = make_prompts(6), Sampling(9, temperature=1.0, top_p=0.9)
    alone = [TextGenerator(ours, Numbers(), slots=1).generate([p], sampling, [k])[0]
             for k, p in enumerate(prompts)]  # fmt: skip
    together = TextGenerator(ours, Numbers(), slots=4).generate(prompts, sampling)
    assert [a.ids for a in alone] == [a.ids for a in together]
    assert together[0].ids != together[5].ids  # equal prompts, other numbers
    other = TextGenerator(ours, Numbers(), slots=4).generate(
        prompts, Sampling(9, temperature=1.0, top_p=0.9, seed=1)
    )
    assert [a.ids for a in other] != [a.ids for a in together]


def test_a_seed_and_a_number_are_not_added_up():
    """Answer 1 under seed 42 is another than answer 0 under seed 43, or 42 under seed 1."""
    ours, _ = make_pair({})
    generator, (prompt, *_) = TextGenerator(ours, Numbers()), make_prompts(2)
    answers = [
        generator.generate([prompt], Sampling(9, temperature=1.0, seed=seed), [number])[0].ids
        for seed, number in ((42, 1), (43, 0), (1, 42))
    ]
    assert all(a != b for a, b in zip(answers, answers[1:] + answers[:1], strict=True))


def test_stop_strings_and_limits():
    """An answer ends before the first stop string, or at the context; a full prompt gives none."""
    ours, _ = make_pair({})
    (prompt, *_), most = make_prompts(2), 20
    generator = TextGenerator(ours, Numbers(), context=len(prompt) + most)
    whole = generator.generate([prompt], Sampling(most))[0]
    assert len(whole.ids) == most and whole.finish == "length"
    first, second = f"{whole.ids[5]} {whole.ids[6]}", f" {whole.ids[9]} "
    stopped = generator.generate([prompt], Sampling(most, stop=(second, first)))[0]
    end = min(whole.text.find(first), whole.text.find(second))
    assert (stopped.text, stopped.finish) == (whole.text[:end], "stop")
    cut = generator.generate([prompt], Sampling(most + 1))[0]
    assert (cut.ids, cut.finish) == (whole.ids, "context")
    full = generator.generate([whole.ids * 9], Sampling(most))[0]
    assert (full.ids, full.finish) == ([], "context")


def test_of_two_stop_strings_the_first_in_the_text_counts():
    """Where one token completes both: the answer ends before the one that begins earlier."""
    ours, _ = make_pair({})
    (prompt, *_), generator = make_prompts(2), TextGenerator(ours, Numbers())
    whole = generator.generate([prompt], Sampling(9))[0]
    token = next(k for k, i in enumerate(whole.ids) if k > 1 and i > 9 and i not in whole.ids[:k])
    last = f"{whole.ids[token]} "
    for stop in ((last, last[1:]), (last[1:], last)):
        stopped = generator.generate([prompt], Sampling(9, stop=stop))[0]
        assert (stopped.ids, stopped.finish) == (whole.ids[: token + 1], "stop")
        assert stopped.text == "".join(f"{i} " for i in whole.ids[:token])


@pytest.mark.parametrize("stop", ["é", "日", "日本語", "😀😀😀😀😀"])
def test_stop_strings_of_several_tokens_a_character(tokenizer_folder, stop, monkeypatch):
    """They end an answer at once, also where each character is written in bytes."""
    ours, tokenizer = make_pair({})[0], Tokenizer(tokenizer_folder)
    text = f"The dog{stop} and more"
    ids = tokenizer.sp.encode(text)
    answer = iter(ids)
    assert len(tokenizer.sp.encode(stop)) > len(stop)
    generator = TextGenerator(ours, tokenizer)
    generator.next_logits = lambda active: torch.zeros(len(active), 1)
    monkeypatch.setattr("decoding.generator.choose", lambda *_: torch.tensor([next(answer)]))
    found = generator.generate([[3]], Sampling(99, stop=(stop,)))[0]
    assert (found.text, found.finish) == (" The dog", "stop")
    assert tokenizer.decode(found.ids) == f"The dog{stop}"


def test_equal_prompts_are_answered_like_one():
    """Also where they are long enough to be read once: the last token of each is left to read."""
    ours, theirs = make_pair({})
    prompt = make_prompts(2, beginning=41)[0]
    for prompts in ([prompt] * 5, [prompt] * 4 + [prompt[:-1]]):
        answers = TextGenerator(ours, Numbers(), slots=3).generate(prompts, Sampling(7))
        assert [a.ids for a in answers] == [their_answer(theirs, p, 7) for p in prompts]
        found = TextGenerator(ours, Numbers(), slots=3).option_logps(prompts, [[[7], [8, 9]]] * 5)
        alone = TextGenerator(ours, Numbers()).option_logps(prompts[-1:], [[[7], [8, 9]]])
        assert found[-1] == pytest.approx(alone[0], abs=2e-5)  # two times 1e-5, see test_model


def test_stream_goes_on_from_the_last_one():
    """The pieces are generate's text; a second turn runs only what is new, also after Ctrl-C."""
    ours, _ = make_pair({})
    generator, fresh = (TextGenerator(ours, Numbers(), slots=1) for _ in range(2))
    prompt, sampling = make_prompts(4)[1] * 3, Sampling(11)
    pieces = list(generator.stream(prompt, sampling))
    expected = fresh.generate([prompt], sampling)[0]
    assert "".join(text for text, _ in pieces) == expected.text
    assert [finish for _, finish in pieces][-1] == expected.finish == "length"
    assert all(finish is None for _, finish in pieces[:-1])
    tokens = []  # of each forward pass
    ours.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    second = prompt + expected.ids[:5] + [EOS, 7, 8, 9]
    stream = generator.stream(second, sampling)
    next(stream), next(stream)
    stream.close()  # as Ctrl-C does
    assert tokens[0] == 4  # EOS and the three after it
    third = second + [11, 12]
    assert "".join(t for t, _ in generator.stream(third, sampling)) == "".join(
        t for t, _ in fresh.stream(third, sampling)
    )


def test_a_turn_of_a_chat_has_random_numbers_of_its_own(monkeypatch):
    """The same prompt under the same seed draws the same number; the next turn draws another."""
    ours, _ = make_pair({})
    generator, drawn = TextGenerator(ours, Numbers(), slots=1), []

    def draw(logits, sequences, sampling):  # in place of `choose`: the answer ends at once
        drawn.append(sequences[0].random.random())
        return torch.tensor([EOS])

    monkeypatch.setattr("decoding.generator.choose", draw)
    for ids, seed in (([3, 4], 42), ([3, 4], 42), ([3, 4, 5], 42), ([3, 4], 41)):
        list(generator.stream(ids, Sampling(5, temperature=1.0, seed=seed)))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_a_chat_outgrows_its_cache():
    """A turn that needs a larger cache is answered as if it were the first, up to the context."""
    ours, _ = make_pair({})
    generator, prompts = TextGenerator(ours, Numbers(), context=411, slots=1), make_prompts(4)
    capacities = []
    for length in (20, 253, 400, 410):
        ids = (prompts[1] * 99)[:length]
        answer = "".join(text for text, _ in generator.stream(ids, Sampling(5)))
        fresh = TextGenerator(ours, Numbers(), context=411).generate([ids], Sampling(5))[0]
        assert answer == fresh.text
        capacities.append(generator.cached.cache.capacity)
    assert capacities == [256, 512, 512, 512]


def test_too_long_a_prompt_is_refused():
    """A chat that fills the context, and an option that does not fit, say how long they are."""
    ours, _ = make_pair({})
    generator = TextGenerator(ours, Numbers(), context=8)
    with pytest.raises(InputError, match="9 tokens.* 8"):
        list(generator.stream([3] * 9, Sampling()))
    with pytest.raises(InputError, match="9 tokens.* 8"):
        generator.option_logps([[3] * 7], [[[4, 5]]])


def test_continuation_keeps_the_space(tokenizer_folder):
    """Prompt plus continuation is the text of both together: code needs its indent."""
    tokenizer = Tokenizer(tokenizer_folder)
    for text in ("def add(a, b):\n    return a", "a  b", "Größe 日本"):
        ids = tokenizer.sp.encode(text)
        for cut in range(1, len(ids)):
            head = tokenizer.sp.decode(ids[:cut])
            if "\ufffd" not in head:
                assert head + tokenizer.continuation(ids[cut:]) == text


def test_ids_without_a_piece_have_no_text(tokenizer_folder):
    """A model with a padded embedding can choose an id that the tokenizer has no piece for."""
    tokenizer = Tokenizer(tokenizer_folder)
    ids = tokenizer.sp.encode("The dog")
    padded = [ids[0], tokenizer.vocab_size, *ids[1:], tokenizer.vocab_size + 9]
    assert tokenizer.continuation(padded) == tokenizer.continuation(ids) == " The dog"
    assert tokenizer.decode(padded) == "The dog" and tokenizer.visible(padded) == " The dog"


LAYOUTS = {
    "as on CUDA, (B, S, H, D) in memory": (0, 2, 1, 3),
    "heads last": (0, 2, 3, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1:1", "2:1, like Code Llama"])
def test_attention_may_return_any_strides(name, layout, monkeypatch):
    """The same answers, streams and scores whatever the memory order of torch's attention."""
    ours, _ = make_pair(VARIANTS[name])
    prompts, options = make_prompts(6, beginning=41), [[[4, 5], [6, 7, 8], [9]]] * 6
    calls = []

    def everything():
        generator = TextGenerator(ours, Numbers(), slots=4)
        answers = generator.generate(prompts, Sampling(5))
        turns = [prompts[0][:-1], prompts[0] + [7, 8]]
        streams = [list(generator.stream(turn, Sampling(5))) for turn in turns]
        return answers, streams, generator.option_logps(prompts, options)

    def permuted(*arguments):
        out = scaled_dot_product_attention(*arguments)
        order = LAYOUTS[layout]
        back = [order.index(dim) for dim in range(4)]
        calls.append(out.shape)
        return out.permute(order).contiguous().permute(back)

    expected = everything()
    monkeypatch.setattr("decoding.kv_cache.scaled_dot_product_attention", permuted)
    assert everything() == expected
    assert len({shape[0] for shape in calls}) > 1  # batches of steps, and single extensions
