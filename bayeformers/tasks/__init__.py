"""Benchmark tasks as data: what their files look like, how they are loaded, and how they are scored."""

from .answers import Answers, SpanDistribution, SpanReader
from .conll import Entity, Sentence, find_entities, read_conll, write_conll
from .entities import TaggedSentence, entity_report, entity_scores, tag_sentence
from .glue import GLUE_TASKS, GlueTask, TsvLayout, read_split, read_task, read_tsv
from .loading import load_glue, load_hub, load_tsv
from .pieces import CERTAIN, at_words, encode_words
from .squad import Question, parse_squad, read_squad, split_articles
from .windows import Reading, Window, read_windows

__all__ = [
    "CERTAIN", "GLUE_TASKS", "Answers", "Entity", "GlueTask", "Question", "Reading", "Sentence", "SpanDistribution",
    "SpanReader", "TaggedSentence", "TsvLayout", "Window", "at_words", "encode_words", "entity_report",
    "entity_scores", "find_entities", "load_glue", "load_hub", "load_tsv", "parse_squad", "read_conll", "read_split",
    "read_squad", "read_task", "read_tsv", "read_windows", "split_articles", "tag_sentence", "write_conll",
]  # fmt: skip
