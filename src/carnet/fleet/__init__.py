"""A crossing on the machines of a Ray cluster: ``carnet.fleet.cross`` does what ``carnet.cross`` does, byte for byte, with all of them.

The one who calls plans and proves once; nodes measure, write and examine parts (``executor/parts.py``), each as often as it takes.
Where tasks run, and what happens when a machine is lost, is Ray's affair: ``pip install 'carnet[ray]'`` here and on the nodes.
"""

from carnet.fleet.cluster import Node
from carnet.fleet.crossing import cross

__all__ = ["Node", "cross"]
