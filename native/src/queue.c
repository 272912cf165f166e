/* queue.c - messages in order, delivered by a thread of their own. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

int vdf_queue_init(vdf_queue *queue)
{
    memset(queue, 0, sizeof *queue);
    queue->tail = &queue->head;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->filled, NULL);
    return 0;
}

void vdf_queue_destroy(vdf_queue *queue)
{
    while (queue->head != NULL) {
        vdf_message *message = queue->head;
        queue->head = message->next;
        free(message);
    }
    pthread_cond_destroy(&queue->filled);
    pthread_mutex_destroy(&queue->lock);
}

int vdf_queue_put(vdf_queue *queue, const void *data, size_t length)
{
    vdf_message *message = malloc(sizeof *message + length);

    if (message == NULL)
        return -ENOMEM;
    message->next = NULL;
    message->length = length;
    memcpy(message->data, data, length);
    pthread_mutex_lock(&queue->lock);
    *queue->tail = message;
    queue->tail = &message->next;
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
    return 0;
}

vdf_message *vdf_queue_take(vdf_queue *queue)
{
    vdf_message *message;

    pthread_mutex_lock(&queue->lock);
    while (queue->head == NULL && !queue->closed)
        pthread_cond_wait(&queue->filled, &queue->lock);
    message = queue->head;
    if (message != NULL) {
        queue->head = message->next;
        if (queue->head == NULL)
            queue->tail = &queue->head;
        queue->busy = true;
    }
    pthread_mutex_unlock(&queue->lock);
    return message;
}

void vdf_queue_done(vdf_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->busy = false;
    pthread_mutex_unlock(&queue->lock);
}

bool vdf_queue_idle(vdf_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    bool idle = queue->head == NULL && !queue->busy;
    pthread_mutex_unlock(&queue->lock);
    return idle;
}

void vdf_queue_close(vdf_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->closed = true;
    pthread_cond_broadcast(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
}
