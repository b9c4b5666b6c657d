// A network of machines in user space: one TAP device in each network namespace, and a switch that
// forwards a frame after a delay and sends no faster than a rate. For kernels without netem.
//
// relay NAMESPACE..        then, on standard input, lines of
//   WITHIN_US ACROSS_US RATE_MBIT PER_NODE
// each answered by "ok". Machine i has the address 02:00:00:00:00:(i + 1) and is on node
// i / PER_NODE. A machine's frames leave one after the other at the rate; each then takes the delay
// within a node or across. A machine that is ahead of its rate is not read from, so that nothing is
// dropped and its kernel holds the rest.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 16, SIZE = 65536, AHEAD = 100000 };  // ns that a machine may be ahead of its rate

typedef struct Frame {
  struct Frame *next;
  int64_t due;
  int length;
  unsigned char data[SIZE];
} Frame;

typedef struct {
  Frame *first, *last;
} Queue;

static Queue queues[MOST][MOST];  // by sender and receiver: due times rise along each
static Frame *spare;
static int64_t leaves[MOST];  // when the last frame of a machine is on its way
static double within = 0, across = 0, per_bit = 0;  // ns
static int per_node = MOST, machines;

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_tap(const char *name) {
  char path[256];
  snprintf(path, sizeof path, "/var/run/netns/%s", name);
  int space = open(path, O_RDONLY);
  if (space < 0 || setns(space, CLONE_NEWNET)) fail(path);
  close(space);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  if (fd < 0) fail("/dev/net/tun");
  struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
  strcpy(request.ifr_name, "net0");
  if (ioctl(fd, TUNSETIFF, &request)) fail("TUNSETIFF");
  return fd;
}

static void take(int from, Frame *frame) {
  int to = frame->data[5] - 1;
  static const unsigned char prefix[5] = {2};
  if (memcmp(frame->data, prefix, 5) || to < 0 || to >= machines || to == from) {
    frame->next = spare, spare = frame;  // multicast and the like
    return;
  }
  int64_t t = now();
  if (leaves[from] < t) leaves[from] = t;
  leaves[from] += 8 * per_bit * frame->length;
  frame->due = leaves[from] + (from / per_node == to / per_node ? within : across);
  frame->next = NULL;
  Queue *queue = &queues[from][to];
  if (queue->first) queue->last->next = frame;
  else queue->first = frame;
  queue->last = frame;
}

static void receive(int from, int fd) {
  for (int i = 0; i < 8 && leaves[from] <= now() + AHEAD; i++) {
    Frame *frame = spare;
    if (frame) spare = frame->next;
    else if (!(frame = malloc(sizeof *frame))) fail("malloc");
    frame->length = read(fd, frame->data, SIZE);
    if (frame->length > 0) {
      take(from, frame);
      continue;
    }
    frame->next = spare, spare = frame;
    if (errno != EAGAIN) fail("read");
    return;
  }
}

// Hands over what is due; returns when something will be.
static int64_t deliver(struct pollfd *taps) {
  int64_t soonest = INT64_MAX;
  for (int from = 0; from < machines; from++)
    for (int to = 0; to < machines; to++) {
      Queue *queue = &queues[from][to];
      for (Frame *frame; (frame = queue->first) && frame->due <= now();) {
        if (write(taps[to].fd, frame->data, frame->length) < 0 && errno != EIO) fail("write");
        queue->first = frame->next;
        frame->next = spare, spare = frame;
      }
      if (queue->first && queue->first->due < soonest) soonest = queue->first->due;
    }
  return soonest;
}

static void control(void) {
  char line[256];
  int length = read(0, line, sizeof line - 1);
  if (length <= 0) exit(0);  // whoever started this has gone
  line[length] = 0;
  double rate;
  if (sscanf(line, "%lf %lf %lf %d", &within, &across, &rate, &per_node) != 4) fail(line);
  within *= 1e3, across *= 1e3, per_bit = rate ? 1e3 / rate : 0;
  if (write(1, "ok\n", 3) != 3) fail("stdout");
}

int main(int count, char **names) {
  struct pollfd taps[MOST + 1];
  machines = count - 1;
  if (machines < 1 || machines > MOST) return 1;
  for (int i = 0; i < machines; i++) taps[i] = (struct pollfd){open_tap(names[i + 1]), POLLIN, 0};
  taps[machines] = (struct pollfd){0, POLLIN, 0};
  prctl(PR_SET_TIMERSLACK, 1);
  struct sched_param urgent = {.sched_priority = 1};
  sched_setscheduler(0, SCHED_FIFO, &urgent);  // a wire does not wait for a processor
  if (write(1, "ok\n", 3) != 3) fail("stdout");
  for (;;) {
    int64_t soonest = deliver(taps), t = now();
    for (int i = 0; i < machines; i++) {
      int64_t ready = leaves[i] - AHEAD;
      taps[i].events = ready <= t ? POLLIN : 0;
      if (ready > t && ready < soonest) soonest = ready;
    }
    int64_t wait = soonest <= t ? 0 : soonest - t;
    struct timespec limit = {wait / 1000000000, wait % 1000000000};
    if (ppoll(taps, machines + 1, soonest == INT64_MAX ? NULL : &limit, NULL) < 0) fail("ppoll");
    for (int i = 0; i < machines; i++)
      if (taps[i].revents & POLLIN) receive(i, taps[i].fd);
    if (taps[machines].revents) control();
  }
}
