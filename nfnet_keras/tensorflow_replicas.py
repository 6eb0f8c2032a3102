"""Which replica of a `tf.distribute` strategy this is, and whether there are others."""

import tensorflow as tf


def replica_number():
    """Returns the number of this replica among several of a `tf.distribute` strategy, `None` where there is one.

    Example:

    >>> replica_number() is None
    True
    """
    if is_alone():
        return None
    return tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)


def is_alone() -> bool:
    """Whether there is no other replica to sum gradients with: one device, or not inside of a replica at all.

    Example:

    >>> is_alone()
    True
    """
    context = tf.distribute.get_replica_context()
    return context is None or context.num_replicas_in_sync == 1


def has_one_replica() -> bool:
    """Whether the strategy in use computes on one device, asked inside of a replica or outside, as in an update.

    Example:

    >>> has_one_replica()
    True
    """
    return tf.distribute.get_strategy().num_replicas_in_sync == 1


def has_strategy() -> bool:
    """Whether this is inside of a `tf.distribute` strategy, of several devices or of one.

    Example:

    >>> has_strategy()
    False
    """
    return tf.distribute.has_strategy()


def shares_processor() -> bool:
    """Whether this is one of several replicas that are all on this machine's processor.

    Example:

    >>> shares_processor()
    False
    """
    strategy = tf.distribute.get_strategy()
    if is_alone() or not isinstance(strategy, tf.distribute.MirroredStrategy):
        return False
    return all("CPU" in name for name in strategy.extended.worker_devices)
