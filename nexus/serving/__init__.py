"""Where teachers live and how requests reach them: pure policies, no actor, no tensor."""
