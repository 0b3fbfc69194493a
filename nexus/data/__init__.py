"""From files to records to token batches: reading, normalising, quarantining, bucketing.

Nothing is imported here, so that looking at a record or a sample file never waits for torch.
"""
