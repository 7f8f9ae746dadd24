/** Registrations for events on one connection: each kind is asked for once, however many listen, and called off with the last of them. */
import type { Connection } from "./connection.ts";
import type { EventFamily, EventRegistrar } from "./events.ts";
import { int32, tuple } from "./xdr.ts";

interface Registration {
  listeners: number;
  /** The number that libvirt gave to it. */
  readonly callbackId: Promise<number>;
  /** Set when the last listener has gone. Never rejects. */
  calledOff: Promise<void> | undefined;
}

export class Subscriptions {
  readonly #connection: Connection;
  /** By the procedure number of the message. */
  readonly #registrations = new Map<number, Registration>();

  constructor(connection: Connection) {
    this.#connection = connection;
  }

  /** Resolves when libvirt sends the events, with the function that ends it and may be called twice. No event after that moment is missed. */
  async add<Events, Kind extends keyof Events>(
    family: EventFamily<Events>,
    kind: Kind,
    listener: (event: Events[Kind]) => void,
  ): Promise<() => Promise<void>> {
    const row = family.rows[kind];
    const registration = this.#join(family, row.eventId, row.procedure);
    const stopListening = this.#connection.onMessage(row.procedure, tuple<[number, Events[Kind]]>(int32, row.body), ([, event]) =>
      listener(event),
    );
    const end = async (): Promise<void> => {
      stopListening();
      await this.#leave(family, registration);
    };
    try {
      await registration.callbackId;
    } catch (error) {
      await end();
      throw error;
    }
    let ended: Promise<void> | undefined;
    return () => (ended ??= end());
  }

  #join(registrar: EventRegistrar, eventId: number, procedure: number): Registration {
    const known = this.#registrations.get(procedure);
    if (known !== undefined && known.calledOff === undefined) {
      known.listeners += 1;
      return known;
    }
    const before = known?.calledOff ?? Promise.resolve();
    const registration: Registration = {
      listeners: 1,
      callbackId: before.then(() => this.#connection.call(registrar.register, [eventId, undefined])),
      calledOff: undefined,
    };
    this.#registrations.set(procedure, registration);
    return registration;
  }

  async #leave(registrar: EventRegistrar, registration: Registration): Promise<void> {
    registration.listeners -= 1;
    if (registration.listeners > 0) return;
    registration.calledOff = registration.callbackId
      .then((callbackId) => this.#connection.call(registrar.deregister, [callbackId]))
      .catch(() => {
        // Never registered, or the connection has ended and its registrations with it.
      });
    await registration.calledOff;
  }
}
