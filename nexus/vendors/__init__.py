"""Teachers whose vendors' packages pin an old transformers: each such package has an environment of its own.

environments.py, which every process may import, says where those environments are. All other modules run inside one of them and
import nothing of nexus that needs transformers 5. Only columnar targets cross back.
"""
