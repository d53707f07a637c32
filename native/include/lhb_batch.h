/* Write batches: the page-cache writes of one turn to several replicas.
 *
 * One queue thread copying every payload N times would make N replicas cost N
 * times the latency while other CPUs idle.  So the copies ("legs") of a turn
 * are gathered, and when there are many of them, workers help: everybody takes
 * the next leg until none is left.  Few legs are done by the queue's thread
 * alone, for waking a worker costs more than they do.
 */
#ifndef LHB_BATCH_H
#define LHB_BATCH_H

#include <stdbool.h>

struct lhb_batches;
struct lhb_engine;
struct lhb_leg;
struct lhb_queue;

int lhb_batches_open (struct lhb_queue *queue, struct lhb_batches **out);
/* Nothing is gathered or under way. */
void lhb_batches_close (struct lhb_batches *batches);

/* The queue's thread only. */
/* False: full, do it now. */
bool lhb_batches_add (struct lhb_batches *batches, struct lhb_leg *leg);
/* Do what was gathered; legs end in lhb_leg_done. */
void lhb_batches_run (struct lhb_batches *batches);
bool lhb_batches_pending (const struct lhb_batches *batches);

#endif
