"""Benchmark tasks as data: what their files look like, how they are loaded, and how they are scored."""

from .answers import Answers, SpanDistribution, SpanReader
from .clinc import read_clinc
from .conll import Entity, Sentence, find_entities, read_conll, write_conll
from .entities import TaggedSentence, entity_report, entity_scores, tag_sentence
from .glue import GLUE_TASKS, GlueTask, TsvLayout, read_split, read_task, read_tsv
from .loading import load_glue, load_hub, load_text_task, load_tsv
from .pieces import CERTAIN, at_words, encode_words
from .registry import TEXT_TASKS
from .squad import Question, parse_squad, read_squad, split_articles
from .text import HubCopy, TextTask
from .trec import read_trec
from .windows import Reading, Window, read_windows

__all__ = [
    "CERTAIN", "GLUE_TASKS", "TEXT_TASKS", "Answers", "Entity", "GlueTask", "HubCopy", "Question", "Reading",
    "Sentence", "SpanDistribution", "SpanReader", "TaggedSentence", "TextTask", "TsvLayout", "Window", "at_words",
    "encode_words", "entity_report", "entity_scores", "find_entities", "load_glue", "load_hub", "load_text_task",
    "load_tsv", "parse_squad", "read_clinc", "read_conll", "read_split", "read_squad", "read_task", "read_trec",
    "read_tsv", "read_windows", "split_articles", "tag_sentence", "write_conll",
]  # fmt: skip
