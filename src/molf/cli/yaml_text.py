"""YAML of users, parsed within bounds."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_MOST_NODES = 10_000
"""Most values of a document with all aliases written out; the largest sweep has hundreds."""

_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level > _DEEPEST:  # scanning takes the square of the depth
            raise ConstructorError(None, None, "lists and mappings are nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(kind)


def _integer(loader: _Loader, node: ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= 2**64:  # a hexadecimal one may have more digits than Python writes
        raise ConstructorError(None, None, "an integer of more than 64 bits", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_yaml(text: str) -> Any:
    """Parse a document as ``yaml.safe_load`` does.

    Raises:
        yaml.YAMLError: It is not valid, repeats a key, which would lose the first value, or holds more values than can be used:
            a few lines of nested aliases stand for billions.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {}, set())
        return loader.construct_document(root)
    except RecursionError as error:
        raise ConstructorError(None, None, "lists and mappings are nested too deeply", loader.get_mark()) from error
    except ValueError as error:  # such as a date that does not exist
        raise ConstructorError(None, None, str(error), loader.get_mark()) from error
    finally:
        loader.dispose()


def _count(node: Node, known: dict[Node, int], around: set[Node]) -> int:
    """Return how many values a node stands for."""
    if node in around:
        raise ConstructorError(None, None, "an alias inside of its own anchor", node.start_mark)
    if node not in known:
        around.add(node)
        known[node] = 1 + sum(_count(child, known, around) for child in _children(node))
        around.remove(node)
    if known[node] > _MOST_NODES:
        raise ConstructorError(None, None, f"more than {_MOST_NODES:,} values, aliases written out", node.start_mark)
    return known[node]


def _children(node: Node) -> list[Node]:
    if isinstance(node, SequenceNode):
        return list(node.value)
    if not isinstance(node, MappingNode):
        return []
    seen = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode) and key.value in seen:
            raise ConstructorError(None, None, f"the key {key.value!r} occurs twice", key.start_mark)
        if isinstance(key, ScalarNode):
            seen.add(key.value)
    return [child for pair in node.value for child in pair]
