"""Train the starter's base model from nothing: a tokenizer, then a 6-block Llama.

    python scripts/starter_pretrain.py --data ../shared/data --out runs/starter

Reads `lamp_news/*/user_others.json` (CC BY 4.0) and `open_text` (public domain), and nothing
else. A document is one article with its fields in random order (`description:`, `headline:`,
`category:`, and `keywords:`, the rarest words of the description in their order, which teaches
copying) or a run of a book's paragraphs with `keywords:`. Checkpoints every 200 steps into
`--out/checkpoint.pt`; the same command resumes. The result is a Hugging Face folder, bf16, in
`--out/model`, and `--out/pretrain.json` with data counts and losses.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, WIDTH, BLOCKS, HEADS, KV_HEADS, MLP = 8192, 256, 6, 8, 4, 768
ROWS, ROW_TOKENS = 32, 128  # one batch: 4,096 tokens
PEAK_LR, DROPOUT, WARMUP_STEPS = 2e-3, 0.1, 100
NEWS_SHARE = (0.40, 0.95)  # share of documents that are news, at the start and at the end
HELD_OUT_USERS = 0.04  # of user_others: never trained on, so that the losses below mean something
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def read_articles(data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Articles of users with few articles, joined over both tasks: (train, held out by user)."""
    by_title: dict[str, dict[str, str]] = {}
    for task, field in (("news_headline", "description"), ("news_categorize", "text")):
        users = json.loads((data / "lamp_news" / task / "user_others.json").read_text())
        for user in users:
            for row in user["profile"]:
                article = by_title.setdefault(
                    row["title"], {"user": user["user_id"], "headline": row["title"]}
                )
                article[field] = row["text"]
                if row.get("category"):
                    article["category"] = row["category"]
    articles = [a for a in by_title.values() if a.get("description")]
    users = sorted({a["user"] for a in articles})
    held = set(random.Random(7).sample(users, round(len(users) * HELD_OUT_USERS)))
    return ([a for a in articles if a["user"] not in held], [a for a in articles if a["user"] in held])


def read_books(data: Path) -> list[str]:
    """Runs of paragraphs of about 80 to 120 words each."""
    chunks: list[str] = []
    for path in sorted((data / "open_text").glob("*.txt")):
        run: list[str] = []
        for line in path.read_text().splitlines():
            run.append(line.strip())
            if sum(len(p.split()) for p in run) > 80:
                chunks.append(" ".join(run)[:900])
                run = []
    return chunks


class Documents:
    """Draws training documents; `share` is the chance of an article rather than a book."""

    def __init__(self, articles: list[dict[str, str]], books: list[str], seed: int) -> None:
        self.articles, self.books, self.random = articles, books, random.Random(seed)
        self.frequency: collections.Counter[str] = collections.Counter()
        for text in [a["description"] + " " + a["headline"] for a in articles] + books:
            self.frequency.update(set(re.findall(r"[\w'’-]+", text.lower())))
        self._queue: list[dict[str, str]] = []

    def keywords(self, text: str, most: int) -> str:
        words = list(dict.fromkeys(re.findall(r"[\w'’-]{3,}", text)))
        rare = sorted(words, key=lambda w: self.frequency[w.lower()])[:most]
        return " ".join(w for w in words if w in set(rare))

    def draw(self, share: float) -> str:
        if self.random.random() >= share:
            text = self.random.choice(self.books)
            if self.random.random() < 0.3:
                short = " ".join(text.split()[:45])
                return f"description: {short}\nkeywords: {self.keywords(short, 7)}"
            return text
        if not self._queue:
            self._queue = self.random.sample(self.articles, len(self.articles))
        a = self._queue.pop()
        fields = ["description", "headline"]
        if "category" in a and self.random.random() < 0.7:
            fields.append("category")
        if self.random.random() < 0.3:
            fields.append("keywords")
        # Mostly the order in which the tasks ask: what an article says, then how it is called.
        if self.random.random() < 0.6:
            rest = fields[1:]
            self.random.shuffle(rest)
            fields = ["description", *rest]
        else:
            self.random.shuffle(fields)
        values = dict(a, keywords=self.keywords(a["description"], 7))
        if fields[:2] == ["description", "category"] and self.random.random() < 0.6:
            values["description"] = a["headline"] + " " + a["description"]  # news_categorize's form
            fields = ["description", "category"]
        return "\n".join(f"{f}: {values[f]}" for f in fields)


def train_tokenizer(articles: list[dict[str, str]], books: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for a in articles:
            for _ in range(4):  # the words of news matter more here than the words of 1870
                category = a.get("category", "")
                yield f"description: {a['description']}\nheadline: {a['headline']}\ncategory: {category}"
        yield from books

    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def batches(
    documents: Documents, tokenizer: PreTrainedTokenizerFast, first: int, steps: int
) -> Iterator[torch.Tensor]:
    """Packed rows of ROW_TOKENS + 1 ids; every document starts with <s> and ends with </s>."""
    buffer: list[int] = []
    need = ROWS * (ROW_TOKENS + 1)
    for step in range(first, steps):
        share = NEWS_SHARE[0] + (NEWS_SHARE[1] - NEWS_SHARE[0]) * step / steps
        while len(buffer) < need:
            texts = [documents.draw(share) for _ in range(64)]
            for ids in tokenizer(texts)["input_ids"]:
                buffer += [*ids, 1]
        yield torch.tensor(buffer[:need]).view(ROWS, ROW_TOKENS + 1)
        buffer = buffer[need:]


class Dropped(nn.Module):
    """A projection followed by dropout; undone before saving."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.inner(x))  # type: ignore[no-any-return]


def set_dropout(model: LlamaForCausalLM, *, on: bool) -> None:
    for block in model.model.layers:
        for owner, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            module = getattr(owner, name)
            setattr(owner, name, Dropped(module) if on else module.inner)


@torch.no_grad()
def target_loss(model: nn.Module, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """Mean nats a token over the target and </s>, one pair at a time."""
    total = count = 0.0
    for prompt, target in pairs:
        head = tokenizer(prompt)["input_ids"][-300:]
        tail = [*tokenizer(target, add_special_tokens=False)["input_ids"], 1]
        logits = model(input_ids=torch.tensor([head + tail]), use_cache=False).logits[0].float()
        total += float(F.cross_entropy(logits[len(head) - 1 : -1], torch.tensor(tail), reduction="sum"))
        count += len(tail)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/starter"))
    parser.add_argument("--tokens", type=float, default=9e6, help="training tokens in all")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    articles, held = read_articles(args.data)
    books = read_books(args.data)
    print(f"{len(articles)} articles, {len(held)} held out, {len(books)} book passages", flush=True)

    folder = args.out / "tokenizer"
    if not folder.exists():
        train_tokenizer(articles, books).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    set_dropout(model, on=True)
    steps = math.ceil(args.tokens / (ROWS * ROW_TOKENS))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    first, log, seconds = 0, [], 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, log, seconds = state["step"], state["log"], state["seconds"]
        print(f"resuming at step {first}", flush=True)
    documents = Documents(articles, books, seed=first)
    headline = [(f"description: {a['description']}\nheadline:", " " + a["headline"]) for a in held]
    category = [
        (f"description: {a['headline']} {a['description']}\ncategory:", " " + a["category"])
        for a in held
        if "category" in a
    ]

    compiled = torch.compile(model)
    started = time.monotonic() - seconds
    running = 0.0
    for step, rows in enumerate(batches(documents, tokenizer, first, steps), first):
        # Warm up, hold, then fall to zero over the last 60 %: cosine.
        through = max(0.0, (step / steps - 0.4) / 0.6)
        lr = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * through))
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += float(loss.detach())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{steps} loss {running / 50:.3f} lr {lr:.2e} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 200 == 0 or step + 1 == steps:
            model.eval()
            losses = {
                "headline": target_loss(model, tokenizer, headline[:150]),
                "category": target_loss(model, tokenizer, category[:150]),
            }
            log.append({"step": step + 1, **losses})
            print(f"  held out: {losses}", flush=True)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "log": log,
                    "seconds": time.monotonic() - started,
                },
                checkpoint.with_suffix(".new"),
            )
            checkpoint.with_suffix(".new").replace(checkpoint)

    set_dropout(model, on=False)
    model.eval().to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    (args.out / "pretrain.json").write_text(
        json.dumps(
            {
                "articles": len(articles),
                "held_out_articles": len(held),
                "book_passages": len(books),
                "tokens": steps * ROWS * ROW_TOKENS,
                "seconds": round(time.monotonic() - started),
                "parameters": sum(p.numel() for p in model.parameters()),
                "held_out_loss": {
                    "headline": target_loss(model.float(), tokenizer, headline),
                    "category": target_loss(model, tokenizer, category),
                },
                "log": log,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
