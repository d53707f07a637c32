/* A volume whose replicas are, all or some of them, volumes of another engine
 * behind the data protocol. */
#ifndef LHB_MESH_H
#define LHB_MESH_H

#include <sys/socket.h>

#include "lhb_peer.h"
#include "lhb_rig.h"

enum { MESH_TIMEOUT_MS = 60000 };       /* never reached */

struct mesh {
  struct rig rig;               /* its volume is the one in front */
  lhb_engine *back;
  uint32_t flags;               /* of the peers: LHB_PEER_* */
  uint32_t locals;              /* the first replicas are no peers */
  lhb_volume *replicas[LHB_STORES_MAX];
  lhb_store *stores[LHB_STORES_MAX];    /* what the volume in front has */
  int sockets[LHB_STORES_MAX];  /* duplicates of one end, to cut them */
};

/* Connect a peer to its replica: two connections of the first queue, one of
 * the others. */
static inline void
mesh_connect (struct mesh *mesh, uint32_t index)
{
  uint32_t queues = lhb_engine_queues (mesh->rig.engine);
  lhb_store *peer;

  CHECK_EQUAL (lhb_peer_open (mesh->rig.engine, mesh->rig.blocks * BLOCK,
                              mesh->flags, MESH_TIMEOUT_MS, &peer),
               0);
  for (uint32_t i = 0; i <= queues; i++)
    {
      uint64_t id;
      int fds[2];

      CHECK_EQUAL (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds),
                   0);
      if (i == 0)
        {
          mesh->sockets[index] = dup (fds[0]);
          CHECK (mesh->sockets[index] >= 0);
        }
      CHECK_EQUAL (lhb_replica_attach (mesh->replicas[index], fds[1], &id), 0);
      CHECK_EQUAL (lhb_peer_add_connection (peer, i % queues, fds[0]), 0);
    }
  mesh->stores[index] = peer;
}

static inline void
mesh_publish (struct mesh *mesh, const uint32_t *modes)
{
  CHECK_EQUAL (lhb_volume_publish (mesh->rig.volume, mesh->stores, modes,
                                   mesh->rig.count),
               0);
}

static inline void
mesh_open (struct mesh *mesh, uint32_t flags, uint32_t locals, uint32_t count,
           uint64_t blocks)
{
  *mesh = (struct mesh){ .back = engine_make (LHB_DRIVER_AUTO, 2),
                         .flags = flags,
                         .locals = locals };
  rig_open (&mesh->rig, LHB_DRIVER_AUTO, 0, count, blocks);
  for (uint32_t i = 0; i < count; i++)
    {
      mesh->stores[i] = mesh->rig.stores[i];
      if (i < locals)
        continue;
      CHECK_EQUAL (lhb_volume_open (mesh->back, blocks * BLOCK, 0,
                                    &mesh->replicas[i]),
                   0);
      CHECK_EQUAL (lhb_volume_publish (mesh->replicas[i],
                                       &mesh->rig.stores[i], NULL, 1),
                   0);
      mesh_connect (mesh, i);
    }
  mesh_publish (mesh, NULL);
}

static inline void
mesh_close (struct mesh *mesh)
{
  lhb_fault_clear ();
  if (mesh->rig.volume != NULL)
    rig_close_volume (&mesh->rig);
  for (uint32_t i = mesh->locals; i < mesh->rig.count; i++)
    {
      lhb_store_close (mesh->stores[i]);
      close (mesh->sockets[i]);
      lhb_volume_close (mesh->replicas[i]);
    }
  rig_close (&mesh->rig);
  lhb_engine_close (mesh->back);
}

static inline void
mesh_cut (struct mesh *mesh, uint32_t index)
{
  CHECK_EQUAL (shutdown (mesh->sockets[index], SHUT_RDWR), 0);
}

static inline struct lhb_peer_statistics
mesh_statistics (struct mesh *mesh, uint32_t index)
{
  struct lhb_peer_statistics statistics;

  lhb_peer_statistics (mesh->stores[index], &statistics);
  return statistics;
}

#endif
