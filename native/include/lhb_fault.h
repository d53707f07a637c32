/* Fault points.  Costs one predictable branch while none is armed. */
#ifndef LHB_FAULT_H
#define LHB_FAULT_H

#include <stdatomic.h>
#include <stdint.h>

/* The points; lhb_fault_arm refuses other names. */
#define LHB_FAULT_POINTS(X)                                                   \
  X (STORE_READ, "store.read")                                                \
  X (STORE_WRITE, "store.write")                                              \
  X (STORE_SHORT_WRITE, "store.short_write")                                  \
  X (STORE_SYNC, "store.sync")                                                \
  X (STORE_PUNCH, "store.punch")                                              \
  X (STORE_DISCARD_WRITE, "store.discard_write")                              \
  X (STORE_FIEMAP, "store.fiemap")                                            \
  X (MERGE_COPY, "merge.copy")                                                \
  X (UNIT_READ, "unit.read")                                                  \
  X (UNIT_WRITE, "unit.write")                                                \
  X (UNIT_SYNC, "unit.sync")                                                  \
  X (ACTIVITY_WRITE, "activity.write")                                        \
  X (ACTIVITY_SYNC, "activity.sync")                                          \
  X (MAP_ALLOC, "map.alloc")                                                  \
  X (SOCKET_SEND, "socket.send")                                              \
  X (SOCKET_RECEIVE, "socket.receive")                                        \
  X (PEER_ALLOC, "peer.alloc")                                                \
  X (PEER_WATCH, "peer.watch")                                                \
  X (PEER_SEND, "peer.send")                                                  \
  X (PEER_RECEIVE, "peer.receive")

enum lhb_fault_point {
#define X(name, text) LHB_FAULT_##name,
  LHB_FAULT_POINTS (X)
#undef X
  LHB_FAULT_POINT_COUNT
};

extern _Atomic uint32_t lhb_faults_armed;

int lhb_fault_hit (enum lhb_fault_point point, uint64_t store_id);

/* 0, or the -errno this pass must fail with. */
static inline int
lhb_fault (enum lhb_fault_point point, uint64_t store_id)
{
  if (__builtin_expect (atomic_load_explicit (&lhb_faults_armed,
                                              memory_order_relaxed) == 0, 1))
    return 0;
  return lhb_fault_hit (point, store_id);
}

#endif
