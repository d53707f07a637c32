/* A queue: one thread, one event loop, its connections. */
#ifndef LHB_QUEUE_H
#define LHB_QUEUE_H

#include <stdbool.h>

#include "lhb_engine.h"

struct lhb_queue;

int lhb_queue_open (struct lhb_engine *engine, uint32_t index,
                    struct lhb_queue **queue_out);
void lhb_queue_close (struct lhb_queue *queue);
/* Any thread: run message->handle in the queue's thread. */
void lhb_queue_post (struct lhb_queue *queue, struct lhb_message *message);
struct lhb_engine *lhb_queue_engine (struct lhb_queue *queue);
uint32_t lhb_queue_index (const struct lhb_queue *queue);

/* The queue's own thread only. */
struct lhb_batches *lhb_queue_batches (struct lhb_queue *queue);
struct lhb_pollable {
  void (*ready) (struct lhb_pollable *self, uint32_t epoll_events);
  int fd;
};
int lhb_queue_watch (struct lhb_queue *queue, struct lhb_pollable *pollable,
                     uint32_t epoll_events);
void lhb_queue_unwatch (struct lhb_queue *queue, struct lhb_pollable *pollable);

/* Called once, in the first turn after 'deadline_ns' (of lhb_now_ns), unless
 * it is disarmed before.  A timer that is armed stays where it is. */
struct lhb_timer {
  struct lhb_timer *prev, *next;
  uint64_t deadline_ns;
  void (*fire) (struct lhb_timer *self);
  bool armed;
};
void lhb_queue_arm (struct lhb_queue *queue, struct lhb_timer *timer,
                    uint64_t deadline_ns);
void lhb_queue_disarm (struct lhb_queue *queue, struct lhb_timer *timer);

/* Called once at the end of the turn, after all events: to send what the turn
 * gathered.  Asking twice in a turn is one call. */
struct lhb_turn_end {
  struct lhb_turn_end *next;
  void (*run) (struct lhb_turn_end *self);
  int asked;
};
void lhb_queue_at_turn_end (struct lhb_queue *queue,
                            struct lhb_turn_end *turn_end);

#endif
